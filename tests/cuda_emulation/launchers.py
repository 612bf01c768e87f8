"""csrc's CUDA ops as a library for the CPU: host code as it stands, kernels in the emulator, sanitizers around both.

    python -m tests.cuda_emulation.launchers [arguments of pytest]

builds it, if anything has changed, and runs the tests of the backend "cuda" in a process that it serves: those of
tests/ops/ and tests/functional/, and those of tests/cuda_emulation/launched/, which look at the launchers themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layersync_kernels.ops import dispatch, native, registry
from layersync_kernels.ops.gram_alignment import strips

from ..support.emulation import LIBRARY

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
COMPILER = shutil.which("g++")
TESTS = ("tests/ops", "tests/functional", "tests/cuda_emulation/launched")

TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wall"]
FLAGS += ["-Werror", f"-I{FOLDER / 'host'}", f"-isystem{TORCH / 'include'}"]
FLAGS += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SOURCES = [FOLDER / name for name in ("emulator.cpp", "runtime.cpp", "cublaslt.cpp", "faults.cu")]
SOURCES += sorted(path for suffix in ("cu", "cpp") for path in (ROOT / "csrc").rglob(f"cuda*.{suffix}"))


def flags_of(source: Path) -> list[str]:
    """What a file is compiled with. Little is gained by optimising what is instrumented, and it takes twice as long."""
    if source.name == "emulator.cpp":
        return [*FLAGS, "-O2"]
    device = ["-include", str(FOLDER / "emulator.h"), "-x", "c++"] if source.suffix == ".cu" else []
    return [*FLAGS, "-O0", *SANITIZERS, *device]


def build() -> Path:
    """Compile what has changed, in build/cuda_emulation/."""
    folder = ROOT / "build" / "cuda_emulation"
    folder.mkdir(parents=True, exist_ok=True)
    shared = hashlib.sha256(torch.__version__.encode())
    for header in sorted(path for place in (ROOT / "csrc", FOLDER) for path in place.rglob("*.*h")):
        shared.update(header.read_bytes())
    objects = []
    for source in SOURCES:
        flags = flags_of(source)
        digest = shared.copy()
        digest.update("\0".join(flags).encode() + source.read_bytes())
        binary = folder / f"{source.parent.name}_{source.stem}.{digest.hexdigest()[:16]}.o"
        objects.append(binary)
        if not binary.exists():
            for old in folder.glob(f"{source.parent.name}_{source.stem}.*.o"):
                old.unlink()
            part = binary.with_suffix(f".{os.getpid()}")
            subprocess.run([COMPILER, *flags, "-c", source, "-o", part], check=True)
            part.replace(binary)
    library = folder / "libemulated_cuda.so"
    if not library.exists() or any(binary.stat().st_mtime > library.stat().st_mtime for binary in objects):
        # By that soname csrc loads cuBLASLt, and finds what is loaded already: this library.
        links = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl", "-Wl,-Bsymbolic"]
        links += ["-Wl,-soname,libcublasLt.so.99"]
        subprocess.run([COMPILER, "-shared", *SANITIZERS, *objects, *links, "-o", library], check=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """What a process needs that the library is to serve. Sanitizers must come first; fresh memory holds NaN."""
    runtimes = [
        subprocess.run(
            [COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": f"detect_leaks=0:max_malloc_fill_size={1 << 30}:malloc_fill_byte=255",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        LIBRARY: str(library),
    }


@functools.cache
def library() -> ctypes.CDLL:
    """The library that serves this process."""
    return ctypes.CDLL(os.environ[LIBRARY])


@functools.cache
def serve() -> None:
    """Let the library serve the backend "cuda" on tensors of the CPU (once)."""
    library()
    loaded = native.Library(True, "emulated")
    native.cuda = lambda: loaded
    dispatch._OBSTACLES["cuda"] = lambda device: None if device == "cpu" else "the CUDA kernels are emulated here"
    # Tensors of a CPU with units for bf16 would get rows of it, which no card does.
    strips.product_dtype = lambda student, teacher: torch.float32
    for raw in {raw.name: raw for op in registry.ops() for raw in op.raw_ops}.values():
        if "cuda" in raw.python:  # what is Python around the kernels
            torch.library.impl(raw.overloads["cuda"].name(), "CPU")(raw.implementation("cuda"))


@contextlib.contextmanager
def placed(tensors: Mapping[int, Iterable[Tensor]]) -> Iterator[None]:
    """Let tensors be on the cards of these numbers; all others are on card 2."""
    place = library().emulation_place
    pointers = [(card, ctypes.c_void_p(tensor.data_ptr())) for card, members in tensors.items() for tensor in members]
    for card, pointer in pointers:
        place(pointer, card)
    try:
        yield
    finally:
        for _, pointer in pointers:
            place(pointer, -1)


class CublasLt(ctypes.Structure):
    """What the emulated cuBLASLt is told, and what it counts."""

    _fields_ = [
        ("workspace", ctypes.c_size_t),
        *((name, ctypes.c_int) for name in ("refuse", "handles", "questions", "products", "descriptors")),
    ]


def cublaslt() -> Any:
    """The state of the emulated cuBLASLt."""
    function = library().emulation_cublaslt
    function.restype = ctypes.POINTER(CublasLt)
    return function().contents


# Reports of a crash are the sanitizers'.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "tests.cuda_emulation.selection", "-p", "no:cacheprovider"]
PYTEST += ["-p", "no:faulthandler"]


def main(arguments: list[str]) -> int:
    """Build, and run tests."""
    tests = [] if any(argument.startswith("tests") for argument in arguments) else TESTS
    return subprocess.run([*PYTEST, *arguments, *tests], env=environment(build()), cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
