"""Both GPU routes compiled for the supported cards, without a GPU: no spills, 16-byte accesses, bytes in flight."""

import concurrent.futures
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .sass import Kernel, find_cuobjdump, inspect

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = (80, 90, 100)
REGISTERS = 65536  # of a multiprocessor, on all of them
# Little's law for the fastest of these cards: 8 TB/s over 148 multiprocessors, at a loaded latency of 1 µs.
BYTES_IN_FLIGHT = 54 * 1024

needs_cuobjdump = pytest.mark.skipif(
    find_cuobjdump() is None, reason="no cuobjdump: neither a CUDA toolkit nor Triton's wheel is installed"
)


def find_nvcc():
    candidates = [Path(home) / "bin/nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((str(nvcc) for nvcc in candidates if nvcc.exists()), shutil.which("nvcc"))


def bytes_in_flight(kernel):
    """Of a multiprocessor full of threads that have issued a batch of loads. Registers are given out in steps of 8."""
    threads = min(REGISTERS // (-(-kernel.registers // 8) * 8) // 128 * 128, 2048)
    return threads * 16 * kernel.batch


def needed_in_flight(kernel):
    """Backward, a third of the traffic is stores, which nothing waits for."""
    return BYTES_IN_FLIGHT if "forward" in kernel.name else BYTES_IN_FLIGHT * 2 / 3


# ---- CUDA C++


@pytest.fixture(scope="module")
def cuda_kernels(tmp_path_factory):
    """Every kernel of cuda.cuh: capability → kernels."""
    folder = tmp_path_factory.mktemp("nvcc")
    source = folder / "all.cu"
    source.write_text(
        f'#include "{ROOT}/csrc/cosine_alignment/cuda.cuh"\n'
        "void* keep[] = {(void*)layersync::cosine_forward_kernel_for, (void*)layersync::cosine_backward_kernel_for};\n"
    )

    def build(capability):
        cubin = folder / f"{capability}.cubin"
        flags = ["-O3", "-std=c++20", f"-arch=sm_{capability}", "-cubin", "-o", cubin]
        done = subprocess.run([find_nvcc(), *flags, source], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return inspect(cubin)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(CAPABILITIES, pool.map(build, CAPABILITIES), strict=True))


def sizes_of(name):
    """Bytes of an element of both tensors, from a mangled name; S1_ repeats the first type."""
    first, second = re.search(r"kernelI(f|13__nv_bfloat16|6__half)(f|13__nv_bfloat16|6__half|S1_)", name).groups()
    second = first if second == "S1_" else second
    return [4 if dtype == "f" else 2 for dtype in (first, second)]


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc: set CUDA_HOME to a CUDA toolkit")
@needs_cuobjdump
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_cuda_kernels_neither_spill_nor_use_narrow_accesses(cuda_kernels, capability):
    kernels = cuda_kernels[capability]
    # 9 pairs of dtypes, a warp or a block per row; forward, backward for one side and for both.
    assert len(kernels) == 9 * 2 * 3 + 1
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        if "finish" in kernel.name:
            continue
        sizes = sizes_of(kernel.name)
        values = 16 // min(sizes)
        steps = 160 // (values * sum(sizes))  # RowPair::kSteps
        assert kernel.loads[128] == steps * values * sum(sizes) // 16, kernel
        assert kernel.batch == kernel.loads[128], kernel
        assert bytes_in_flight(kernel) >= needed_in_flight(kernel), kernel
        if "backward" in kernel.name:
            written = sizes if "Lb1E" in kernel.name else sizes[:1]
            assert kernel.stores[128] == sum(steps * values * size // 16 + 1 for size in written), kernel  # 1: zero_row


# ---- Triton

CASES = [
    *([90, *dtypes, 1152] for dtypes in (["bfloat16"] * 2, ["float32"] * 2, ["float16"] * 2, ["bfloat16", "float32"])),
    [90, "bfloat16", "bfloat16", 8192],
    [80, "bfloat16", "bfloat16", 1152],
    [80, "float32", "float32", 1152],
    [100, "bfloat16", "bfloat16", 1152],
    [100, "float32", "float32", 1152],
]


def compile_triton(cases, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.compile_triton", json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def triton_kernels(tmp_path_factory):
    pytest.importorskip("triton")
    halves = CASES[::2], CASES[1::2]
    caches = [tmp_path_factory.mktemp("triton") for _ in halves]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(itertools.chain.from_iterable(pool.map(compile_triton, halves, caches)))


@needs_cuobjdump
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_triton_kernels_neither_spill_nor_use_narrow_accesses(triton_kernels, case):
    reports = {report["name"]: report for report in triton_kernels if report["case"] == case}
    for name in ("forward_kernel", "backward_kernel"):
        report = reports[name]
        widths = {int(bits): count for bits, count in report["loads"].items()}
        steps = -(-case[3] // (256 if case[3] <= 2048 else 2048))
        values = sum(8 * (4 if dtype == "float32" else 2) // 16 for dtype in case[1:3])  # 16-byte loads per step
        assert report["spills"] == 0, report
        assert widths.get(128, 0) >= steps * values, report
        assert sum(count for bits, count in widths.items() if bits != 128) <= 12, report  # statistics, weight, gradient
        kernel = Kernel(**{field: report[field] for field in Kernel._fields})
        assert bytes_in_flight(kernel) >= needed_in_flight(kernel), report
    stores = {int(bits): count for bits, count in reports["backward_kernel"]["stores"].items()}
    assert set(stores) == {128}


@needs_cuobjdump
def test_triton_finish_kernel_compiles(triton_kernels):
    assert all(report["spills"] == 0 for report in triton_kernels if report["name"] == "finish_kernel")
