"""Which backend runs an op, and why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..runtime import environment
from . import native, registry
from .autograd import transform

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KERNELS = {"cpp": "C++", "cuda": "CUDA", "triton": "Triton"}
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


def _lacks(op: registry.Op, backend: str, grad: bool) -> str | None:
    """Why an op has no kernel for a call, on whatever machine."""
    if backend == "reference":
        return None
    if backend not in op.backends:
        return f"{op.name} has no {_KERNELS[backend]} kernels; elsewhere runs {op.otherwise}"
    if grad and not op.differentiable:
        return f"the kernels of {op.name} have no gradient, and one is asked for; detach() the input"
    running = transform()
    return None if running is None else f"fused kernels know nothing of {running}"


def _cannot_run(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why the kernels of a backend do not run here."""
    if backend != "reference" and dtype not in FUSED_DTYPES:
        return f"{dtype} runs through the reference only (fused: float32, bfloat16, float16)"
    return _OBSTACLES[backend](device)


def choose(op: str, backend: str, device: str, dtype: torch.dtype, grad: bool = False) -> Choice:
    """Choose the backend of one call.

    Args:
        op: the op, or the public function that is called.
        backend: what the caller asked for, one of `BACKENDS`. "auto" defers to LAYERSYNC_BACKEND where the op has that
            one, then takes the compiled extension where it was built for the device, else Triton on a GPU, else the
            reference.
        device: the type of the tensors' device, e.g. "cuda".
        dtype: the widest dtype among the op's inputs.
        grad: whether a gradient is asked for. Matters for an op whose kernels have none.

    Returns:
        The choice. For an op without backends, which runs on library products everywhere, its backend is "library".

    Raises:
        ValueError: unknown backend.
        RuntimeError: a backend asked for by argument or environment that cannot run; says why and what could.
    """
    entry = registry.find(op)
    asked, wish = f"backend={backend!r}", backend
    if backend == "auto":
        asked, wish = f"{environment.BACKEND.name}={_environment_backend}", _environment_backend
    if wish not in BACKENDS:
        raise ValueError(f"layersync_kernels: unknown {asked}; expected one of {', '.join(BACKENDS)}")
    if not entry.backends and backend == "auto":
        return Choice("library", entry.otherwise)
    reasons: list[str] = []
    if wish != "auto":
        lacks = _lacks(entry, wish, grad)
        obstacle = lacks or _cannot_run(wish, device, dtype)
        if obstacle is None:
            return Choice(wish, f"asked for by {asked}")
        if lacks is None or backend != "auto":
            possible = [
                name
                for name in BACKENDS[1:]
                if _lacks(entry, name, grad) is None and _cannot_run(name, device, dtype) is None
            ]
            raise RuntimeError(
                f"layersync_kernels: {op}: {asked} cannot run: {obstacle}. Possible here: {', '.join(possible)}"
            )
        reasons.append(f"{asked}: {lacks}")  # one wish for all ops: one that lacks it goes its own way
    for candidate in ("cuda", "triton") if device == "cuda" else ("cpp",):
        obstacle = _lacks(entry, candidate, grad) or _cannot_run(candidate, device, dtype) or entry.slower(candidate)
        if obstacle is None:
            return Choice(candidate, "; ".join([*reasons, "the fastest that runs here"]))
        if obstacle not in reasons:
            reasons.append(obstacle)
    return Choice("reference", "; ".join(reasons))


_chosen: dict[tuple[str, str, str, torch.dtype, bool], str] = {}


def resolve(op: str, backend: str, device: str, dtype: torch.dtype, grad: bool = False) -> str:
    """The name that `choose` gives, remembered: a look-up on the hot path, a constant under torch.compile."""
    if transform() is not None:
        return choose(op, backend, device, dtype, grad).backend
    key = (op, backend, device, dtype, grad)
    name = _chosen.get(key)
    if name is None:
        name = _chosen[key] = choose(op, backend, device, dtype, grad).backend
    return name


# What torch.compiler.assume_constant_result sets; calling that here would import Dynamo, two seconds, with the package.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
