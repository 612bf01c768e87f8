"""Finds and loads the compiled extension, and keeps the reason when it cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import os
from typing import Any, NamedTuple

import torch

from ..runtime import environment

_PACKAGE = __package__.rpartition(".")[0]
_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Library(NamedTuple):
    """Whether a compiled library is loaded, and what there is to say about it."""

    loaded: bool
    reason: str
    facts: Any = None  # the pybind11 module with the build facts
    path: str | None = None  # of the file, where it is loaded


@functools.cache
def cpp() -> Library:
    """Load the C++ kernels for the CPU (once)."""
    if environment.NATIVE.get() == "0":
        return Library(False, f"switched off by {environment.NATIVE.name}=0")
    try:
        facts = importlib.import_module(f"{_PACKAGE}._C")
    except ModuleNotFoundError:
        return Library(
            False,
            "not built: the package was installed without a C++ compiler; "
            "install one and repeat `pip install -e . --no-build-isolation`",
        )
    except ImportError as error:
        return Library(
            False,
            f"built, but does not load beside torch {torch.__version__}: {error}; "
            "it needs torch 2.10 or newer; repeat `pip install -e . --no-build-isolation`",
        )
    return Library(True, f"built with {facts.compiler} against torch {facts.torch_built_with}", facts, facts.__file__)


def _cuda_kernels() -> str | None:
    """What this Python's build has left; the tree may hold that of another, older or for other cards."""
    names = (f"_cuda{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for name in names if os.path.exists(path := os.path.join(_FOLDER, name))), None)


@functools.cache
def cuda() -> Library:
    """Load the CUDA kernels (once). They load on machines without a GPU too, where torch itself is a CUDA build."""
    host = cpp()
    if not host.loaded:
        return Library(False, host.reason)
    found = _cuda_kernels()
    if found is None:
        return Library(
            False, "not built: at installation there was no CUDA toolkit, or LAYERSYNC_BUILD=cpu", host.facts
        )
    built = f"built for {host.facts.cuda_archs} with CUDA {host.facts.cuda_built_with}"
    if torch.version.cuda is None:
        return Library(False, f"{built}, but torch {torch.__version__} is a build without CUDA", host.facts)
    try:
        torch.ops.load_library(found)
    except OSError as error:
        return Library(False, f"{built}, but does not load beside torch {torch.__version__}: {error}", host.facts)
    return Library(True, built, host.facts, found)
