"""The one table of environment variables. `layersync doctor` prints it, docs/backends.md and the build read from it."""

from __future__ import annotations

import os
from typing import NamedTuple


class Variable(NamedTuple):
    """An environment variable, its default and what it does."""

    name: str
    default: str
    meaning: str

    def get(self) -> str:
        """The value in force: the environment's, or the default."""
        return os.environ.get(self.name) or self.default


BACKEND = Variable(
    "LAYERSYNC_BACKEND",
    "auto",
    "auto, reference, cpp, triton, cuda or compile, for the ops that have it (read once, at import)",
)
TUNING = Variable(
    "LAYERSYNC_TUNING",
    "auto",
    "auto (the table that `layersync tune` left in the cache folder), off, or a table's path (read once, at first use)",
)
NATIVE = Variable("LAYERSYNC_NATIVE", "1", "0: leave the compiled extension unloaded (read once, at first use)")
CPU_ISA = Variable(
    "LAYERSYNC_CPU_ISA",
    "best",
    "cap on the CPU kernels: best, generic, avx2 or avx512; a cap above the machine is none (read at the first call)",
)
CUBLASLT = Variable(
    "LAYERSYNC_CUBLASLT",
    "auto",
    "half-precision GELU in the epilogue of cuBLASLt on a GPU: auto (where `layersync tune` found it faster), 0 or 1 "
    "(read once, at import)",
)

BUILD = Variable(
    "LAYERSYNC_BUILD", "auto", "build: auto, none (pure Python), cpu (no CUDA) or cuda (fail without nvcc)"
)
CUDA_ARCHS = Variable("TORCH_CUDA_ARCH_LIST", "by toolkit", 'build: CUDA architectures, e.g. "8.0;9.0;10.0+PTX"')
CUDA_HOME = Variable("CUDA_HOME", "found", "build: the toolkit to use; else the real home of the nvcc on PATH")
MAX_JOBS = Variable("MAX_JOBS", "by memory", "build: parallel compilations; default by cores and free memory")
VARIABLES = (BACKEND, TUNING, NATIVE, CPU_ISA, CUBLASLT, BUILD, CUDA_ARCHS, CUDA_HOME, MAX_JOBS)
