"""Which backend runs an op, and why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..runtime import environment
from . import native

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_environment_backend = environment.BACKEND.get()


class Choice(NamedTuple):
    """A backend, and the reason why it was taken."""

    backend: str
    reason: str


def _cpp_obstacle(device: str) -> str | None:
    if device != "cpu":
        return f"the C++ kernels run on the CPU, the tensors are on {device}"
    library = native.cpp()
    return None if library.loaded else f"the C++ extension is {library.reason}"


def _cuda_obstacle(device: str) -> str | None:
    if device != "cuda":
        return f"the CUDA kernels run on a GPU, the tensors are on {device}"
    library = native.cuda()
    return None if library.loaded else f"the CUDA extension is {library.reason}"


def _triton_obstacle(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton compiles for GPUs, the tensors are on {device} (TRITON_INTERPRET=1 interprets its kernels, slowly)"


_OBSTACLES: dict[str, Callable[[str], str | None]] = {
    "cpp": _cpp_obstacle,
    "cuda": _cuda_obstacle,
    "triton": _triton_obstacle,
    "reference": lambda device: None,
}


def _obstacle(backend: str, device: str, dtype: torch.dtype) -> str | None:
    if backend != "reference" and dtype not in _FUSED_DTYPES:
        return f"{dtype} runs through the reference only (fused: float32, bfloat16, float16)"
    return _OBSTACLES[backend](device)


def _explain(device: str, dtype: torch.dtype) -> Iterator[str]:
    for backend in BACKENDS[1:]:
        obstacle = _obstacle(backend, device, dtype)
        if obstacle is None:
            yield backend


def choose(backend: str, device: str, dtype: torch.dtype) -> Choice:
    """Choose the backend of one call.

    Args:
        backend: what the caller asked for, one of `BACKENDS`. "auto" defers to LAYERSYNC_BACKEND, then takes the
            compiled extension where it was built for the device, else Triton on a GPU, else the reference.
        device: the type of the tensors' device, e.g. "cuda".
        dtype: the widest dtype among the op's inputs.

    Raises:
        ValueError: unknown backend.
        RuntimeError: a backend asked for by argument or environment that cannot run; says why and what could.
    """
    asked = f"backend={backend!r}"
    if backend == "auto":
        backend, asked = _environment_backend, f"{environment.BACKEND.name}={_environment_backend}"
    if backend not in BACKENDS:
        raise ValueError(f"layersync_kernels: unknown {asked}; expected one of {', '.join(BACKENDS)}")
    if backend != "auto":
        obstacle = _obstacle(backend, device, dtype)
        if obstacle is None:
            return Choice(backend, f"asked for by {asked}")
        raise RuntimeError(
            f"layersync_kernels: {asked} cannot run: {obstacle}. Possible here: {', '.join(_explain(device, dtype))}"
        )
    obstacles: list[str] = []
    for candidate in ("cuda", "triton") if device == "cuda" else ("cpp",):
        obstacle = _obstacle(candidate, device, dtype)
        if obstacle is None:
            return Choice(candidate, "; ".join([*obstacles, "the fastest that runs here"]))
        obstacles.append(obstacle)
    return Choice("reference", "; ".join(obstacles))


_chosen: dict[tuple[str, str, torch.dtype], str] = {}


def resolve(backend: str, device: str, dtype: torch.dtype) -> str:
    """The name that `choose` gives, remembered: a look-up on the hot path, a constant under torch.compile."""
    key = (backend, device, dtype)
    name = _chosen.get(key)
    if name is None:
        name = _chosen[key] = choose(backend, device, dtype).backend
    return name


# What torch.compiler.assume_constant_result sets; calling that here would import Dynamo, two seconds, with the package.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
