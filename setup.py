"""Builds the extension: C++ for the CPU wherever there is a compiler, CUDA wherever there is a toolkit; no GPU needed.

LAYERSYNC_BUILD=auto|none|cpu|cuda   what to build (auto: what the machine allows)
TORCH_CUDA_ARCH_LIST="9.0;10.0+PTX"  for which GPUs (default by toolkit)
CUDA_HOME, CXX, MAX_JOBS             the usual ones
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_backend import installed_torch  # noqa: E402

STABLE_ABI = "0x020a000000000000"  # torch 2.10: the binary loads beside that release and every later one
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = ("generic", "avx2", "avx512") if IS_X86 else ("generic",)
MEMORY_PER_JOB_GIB = 2.5


def say(text: str) -> None:
    """Print one line of advice; pip shows it with -v, and a failed build always does."""
    print(f"layersync_kernels: {text}", file=sys.stderr)


def find_compiler() -> str | None:
    """The C++ compiler, by the usual variable or name."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")


def find_cuda_home() -> Path | None:
    """The toolkit's real home: the folder with bin/nvcc, include/ and nvvm/, whatever wrapper stands on PATH."""

    def is_home(folder: Path) -> bool:
        return (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists()

    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(named) if is_home(Path(named)) else None
    nvcc = shutil.which("nvcc")
    if nvcc:
        home = Path(nvcc).resolve().parent.parent
        if is_home(home):
            return home
        # A wrapper script: nvcc itself says where its toolkit is.
        report = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False)
        if match := re.search(r"^#\$ TOP=(.+)$", report.stderr, re.MULTILINE):
            home = Path(match.group(1).strip().strip('"')).resolve()
            if is_home(home):
                return home
    default = Path("/usr/local/cuda")
    return default.resolve() if is_home(default) else None


def toolkit_version(cuda_home: Path) -> tuple[int, int]:
    """(major, minor) of the toolkit."""
    report = subprocess.run([cuda_home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"release (\d+)\.(\d+)", report.stdout)
    if match is None:
        raise RuntimeError(f"layersync_kernels: cannot read the version of {cuda_home / 'bin' / 'nvcc'}")
    return int(match.group(1)), int(match.group(2))


def default_archs(version: tuple[int, int]) -> str:
    """Ampere, Hopper and, from CUDA 12.8 on, Blackwell; PTX of the newest for what comes later."""
    return "8.0;9.0;10.0+PTX" if version >= (12, 8) else "8.0;9.0+PTX"


def bounded_jobs() -> int:
    """Parallel compilations: no more than the cores, nor than the free memory carries."""
    available = 8.0
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        available = int(match.group(1)) / 2**20 if match else available
    return max(1, min(os.cpu_count() or 1, int(available / MEMORY_PER_JOB_GIB)))


def sources(pattern: str) -> list[Path]:
    """The files under csrc/ whose names match."""
    return sorted((ROOT / "csrc").rglob(pattern))


def kernel_sources() -> list[Path]:
    """A file for each op's CPU kernels and instruction set: it names the set and includes the kernels."""
    folder = ROOT / "build" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kernels in sources("cpu_kernels.cpp"):
        for name in INSTRUCTION_SETS:
            path = folder / f"{kernels.parent.name}_{name}.cpp"
            text = f'#define LAYERSYNC_ISA_{name.upper()}\n#include "../../{kernels.relative_to(ROOT)}"\n'
            if not path.exists() or path.read_text() != text:  # or all would be compiled again
                path.write_text(text)
            written.append(path)
    return written


def relative(paths: list[Path]) -> list[str]:
    """As setuptools wants them."""
    return [str(path.relative_to(ROOT)) for path in paths]


def extensions() -> tuple[list[Any], dict[str, Any]]:
    """Extension modules and the command that builds them; empty where there is nothing to build with."""
    wanted = os.environ.get("LAYERSYNC_BUILD") or "auto"
    if wanted not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"layersync_kernels: LAYERSYNC_BUILD={wanted}; expected auto, none, cpu or cuda")
    if wanted == "none":
        say("pure Python by LAYERSYNC_BUILD=none; the reference and Triton remain")
        return [], {}
    if find_compiler() is None:
        if wanted != "auto":
            raise SystemExit(
                f"layersync_kernels: LAYERSYNC_BUILD={wanted}, but no C++ compiler; install g++ or set CXX"
            )
        say("no C++ compiler found: installing without the extension; install g++, then repeat the installation")
        return [], {}

    cuda_home = find_cuda_home() if wanted in ("auto", "cuda") else None
    if cuda_home is not None:
        os.environ["CUDA_HOME"] = str(cuda_home)  # before torch looks for itself, and takes a wrapper for the toolkit
    folder = installed_torch()
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        raise SystemExit(
            f"layersync_kernels: the extension needs torch to build ({error}). Run `pip install 'torch>=2.10'` first, "
            "or drop --no-build-isolation, or set LAYERSYNC_BUILD=none"
        ) from error
    import pybind11

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise SystemExit(f"layersync_kernels: torch {torch.__version__} is too old; needs torch 2.10 or newer")
    if cuda_home is not None and torch.version.cuda is None:
        if wanted == "cuda":
            raise SystemExit(f"layersync_kernels: torch {torch.__version__} has no CUDA; install a CUDA build of it")
        say(f"torch {torch.__version__} is a build without CUDA: building for the CPU only")
        cuda_home = None
    if cuda_home is None and wanted == "cuda":
        raise SystemExit("layersync_kernels: LAYERSYNC_BUILD=cuda, but no CUDA toolkit; set CUDA_HOME to its folder")

    os.environ.setdefault("MAX_JOBS", str(bounded_jobs()))
    version = archs = "none"
    if cuda_home is not None:
        major_minor = toolkit_version(cuda_home)
        version = "{}.{}".format(*major_minor)
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_archs(major_minor))

    abi = f"-DTORCH_TARGET_VERSION={STABLE_ABI}"
    # GCC 12 warns about its own AVX-512 header.
    # -g0: Python's own flags ask for debug information, which takes time and is stripped in the end.
    flags = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wno-uninitialized", "-Wno-maybe-uninitialized", abi]
    if IS_X86:
        flags.append("-DLAYERSYNC_X86")
    host = [path for path in sources("cpu*.cpp") if path.name != "cpu_kernels.cpp"]
    modules = [
        CppExtension(
            "layersync_kernels._C",
            relative([*kernel_sources(), *host, ROOT / "csrc" / "bindings.cpp"]),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=[
                *flags,
                f"-DLAYERSYNC_TORCH_VERSION={torch.__version__}",
                f"-DLAYERSYNC_CUDA_VERSION={version}",
                f"-DLAYERSYNC_CUDA_ARCHS={re.sub('[; ]+', ',', archs)}",
            ],
            extra_link_args=["-Wl,-s"] if sys.platform.startswith("linux") else [],
        )
    ]
    if cuda_home is not None:
        modules.append(
            CUDAExtension(
                "layersync_kernels._cuda",
                relative([*sources("cuda*.cu"), *sources("cuda*.cpp")]),
                extra_compile_args={
                    "cxx": [*flags, "-DUSE_CUDA"],
                    "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", abi, "-lineinfo", "-Xfatbin=-compress-all"],
                },
            )
        )
    return modules, {"build_ext": BuildExtension.with_options(use_ninja=True)}


if __name__ == "__main__":
    ext_modules, cmdclass = extensions()
    setup(ext_modules=ext_modules, cmdclass=cmdclass)
