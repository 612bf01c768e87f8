"""The declarations of cuBLASLt in csrc/gelu/cublaslt.h are those of the real library's header."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from .launchers import COMPILER, FOLDER


def cuda_folders() -> list[Path]:
    """Where the headers of CUDA and its libraries may lie: a toolkit, and the wheels beside torch."""
    wheels = Path(torch.__file__).parents[1].glob("nvidia/*/include")
    toolkits = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return [*(Path(home) / "include" for home in toolkits if home), *wheels]


def test_declarations_match_the_library(tmp_path):
    includes = [folder for folder in cuda_folders() if folder.exists()]
    needed = ("cublasLt.h", "crt/host_defines.h")
    if COMPILER is None or not all(any((folder / name).exists() for folder in includes) for name in needed):
        pytest.skip("needs g++ and the headers of cuBLASLt")
    binary = tmp_path / "cublaslt_abi"
    flags = ["-std=c++20", "-Wall", "-Werror", *(f"-I{folder}" for folder in includes)]
    subprocess.run([COMPILER, *flags, FOLDER / "cublaslt_abi.cpp", "-o", binary, "-ldl"], check=True)
    libraries = [found for folder in includes for found in sorted(folder.parent.glob("lib*/libcublasLt.so.*"))]
    for library in libraries[:1]:
        done = subprocess.run([binary, library], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        # Every descriptor and attribute was taken; what is missing is the handle of a GPU.
        assert "cublasLtMatmulAlgoGetHeuristic failed with status 1 for the forward GEMM" in done.stdout
