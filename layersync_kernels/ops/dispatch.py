"""Which backend runs an op, and why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from ..runtime import environment
from . import compiled, native, registry, tuning
from .autograd import transform

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda", "compile")
PLAIN = ("reference", "compile")
"""The backends that are plain PyTorch; `compiled.plain` gives what they run."""
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


def _compile_obstacle(device: str) -> str | None:
    return compiled.obstacle(device, triton=importlib.util.find_spec("triton") is not None)


_OBSTACLES: dict[str, Callable[[str], str | None]] = {
    "compile": _compile_obstacle,
    "cpp": _cpp_obstacle,
    "cuda": _cuda_obstacle,
    "triton": _triton_obstacle,
    "reference": lambda device: None,
}


def _lacks(op: registry.Op, backend: str, grad: bool) -> str | None:
    """Why an op has nothing of a backend for a call, on whatever machine."""
    if backend == "reference":
        return None
    route = op.routes.get(backend)
    kernels = backend if route is None else route.backend
    if backend == "compile":
        if op.uncompiled is not None:
            return f"{op.name} has no compiled reference: {op.uncompiled}; elsewhere runs {op.otherwise}"
    elif kernels not in op.backends:
        return f"{op.name} has no {_KERNELS[kernels]} kernels; elsewhere runs {op.otherwise}"
    elif grad and not op.differentiable:
        return f"the kernels of {op.name} have no gradient, and one is asked for; detach() the input"
    running = transform()
    return None if running is None else f"fused kernels know nothing of {running}"


def _cannot_run(op: registry.Op, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why what an op has of a backend does not run here."""
    if backend != "reference" and dtype not in FUSED_DTYPES:
        return f"{dtype} runs through the reference only (fused: float32, bfloat16, float16)"
    route = op.routes.get(backend)
    return _OBSTACLES[backend](device) if route is None else _OBSTACLES[route.backend](device) or route.obstacle(dtype)


def candidates(op: str, device: str, dtype: torch.dtype, grad: bool = False) -> dict[str, str | None]:
    """Every backend and route that serves an op → why it cannot run here, or None; see `choose` for the arguments."""
    entry = registry.find(op)
    if not entry.backends:
        return {}
    names = [name for name in (*BACKENDS[1:], *entry.routes) if _lacks(entry, name, grad) is None]
    return {name: _cannot_run(entry, name, device, dtype) for name in names}


def choose(
    op: str, backend: str, device: str, dtype: torch.dtype, grad: bool = False, width: int | None = None
) -> Choice:
    """Choose the backend of one call.

    Args:
        op: the op, or the public function that is called.
        backend: what the caller asked for, one of `BACKENDS` or of the op's routes. "auto" defers to LAYERSYNC_BACKEND
            where the op has that one, then to what `layersync tune` measured for the function, then to `rule`.
        device: the type of the tensors' device, e.g. "cuda".
        dtype: the widest dtype among the op's inputs.
        grad: whether a gradient is asked for. Matters for an op whose kernels have none.
        width: channels of a row, by which measurements are looked up; None leaves them aside.

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
    known = BACKENDS if backend == "auto" else (*BACKENDS, *entry.routes)
    if wish not in known:
        raise ValueError(f"layersync_kernels: unknown {asked}; expected one of {', '.join(known)}")
    if not entry.backends and backend == "auto":
        return Choice("library", entry.otherwise)
    reasons: list[str] = []
    if wish != "auto":
        lacks = _lacks(entry, wish, grad)
        obstacle = lacks or _cannot_run(entry, wish, device, dtype)
        if obstacle is None:
            return Choice(wish, f"asked for by {asked}")
        if lacks is None or backend != "auto":
            possible = [name for name, reason in candidates(op, device, dtype, grad).items() if reason is None]
            raise RuntimeError(
                f"layersync_kernels: {op}: {asked} cannot run: {obstacle}. Possible here: "
                f"{', '.join(possible) or entry.otherwise}"
            )
        reasons.append(f"{asked}: {lacks}")  # one wish for all ops: one that lacks it goes its own way
    measured = None if width is None else _measured(entry, op, device, dtype, grad, width)
    if measured is not None:
        obstacle = _lacks(entry, measured.backend, grad) or _cannot_run(entry, measured.backend, device, dtype)
        if obstacle is None:
            return measured._replace(reason="; ".join([*reasons, measured.reason]))
        reasons.append(f"{measured.backend}, {measured.reason}: {obstacle}")
    return rule(op, device, dtype, grad, reasons)


def _measured(entry: registry.Op, op: str, device: str, dtype: torch.dtype, grad: bool, width: int) -> Choice | None:
    """What the tuning table says of a call that is like what was measured."""
    if (grad and not entry.differentiable) or any(
        route.forced and _cannot_run(entry, name, device, dtype) is None for name, route in entry.routes.items()
    ):
        return None
    found = tuning.find(op, device, dtype, width)
    if found is None:
        return None
    (choice, base, margin), table = found
    what = f"{margin:.2f} times as fast as {base}" if choice != base else "no other is faster by more than the spread"
    return Choice(choice, f"measured {table.date}: {what} ({table.path})")


def rule(op: str, device: str, dtype: torch.dtype, grad: bool = False, reasons: Sequence[str] = ()) -> Choice:
    """What "auto" takes where nothing else decides.

    The compiled extension where it was built for the device, else Triton on a GPU, else the reference.

    Args:
        op: as `choose` takes it, and the next three.
        device: type of the tensors' device.
        dtype: the widest dtype.
        grad: whether a gradient is asked for.
        reasons: what was passed over before.
    """
    entry = registry.find(op)
    passed = list(reasons)
    for candidate in ("cuda", "triton") if device == "cuda" else ("cpp",):
        obstacle = (
            _lacks(entry, candidate, grad) or _cannot_run(entry, candidate, device, dtype) or entry.slower(candidate)
        )
        if obstacle is None:
            return Choice(candidate, "; ".join([*passed, "the fastest that runs here"]))
        if obstacle not in passed:
            passed.append(obstacle)
    return Choice("reference", "; ".join(passed))


_chosen: dict[tuple[Any, ...], str] = {}
_BY_WIDTH = ""


def resolve(
    op: str,
    backend: str,
    device: str,
    dtype: torch.dtype,
    grad: bool = False,
    tokens: torch.Tensor | None = None,
    parts: int = 1,
    heads: int = 1,
) -> str:
    """The name that `choose` gives, remembered: a look-up on the hot path, a constant under torch.compile.

    Where a tuning table speaks of the function, a second look-up is by the width of its rows. One that is symbolic, as
    a compiler may make it, counts as unknown: the choice of a graph holds for all its widths.

    Args:
        op: as `choose` takes it, and the next four.
        backend: what the caller asked for.
        device: type of the tensors' device.
        dtype: the widest dtype.
        grad: whether a gradient is asked for.
        tokens: (..., parts · width).
        parts: rows that lie side by side in a row of `tokens`.
        heads: rows of `tokens` that are one together.
    """
    name = _by_kind(op, backend, device, dtype, grad)
    if name:
        return name
    width = None if tokens is None else heads * tokens.shape[-1] // parts
    if is_dynamo_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return _by_width(op, backend, device, dtype, grad, width if width is None or has_static_value(width) else None)
    # A SymInt comes where something else traces.
    return _by_width(op, backend, device, dtype, grad, width if type(width) is int else None)


def _by_kind(op: str, backend: str, device: str, dtype: torch.dtype, grad: bool) -> str:
    if transform() is not None:
        return choose(op, backend, device, dtype, grad).backend
    key = (op, backend, device, dtype, grad)
    name = _chosen.get(key)
    if name is None:
        tuned = backend == "auto" and tuning.speaks_of(op, device, dtype)
        name = _chosen[key] = _BY_WIDTH if tuned else choose(*key).backend
    return name


def _by_width(op: str, backend: str, device: str, dtype: torch.dtype, grad: bool, width: int | None) -> str:
    key = (op, backend, device, dtype, grad, width)
    name = _chosen.get(key)
    if name is None:
        name = _chosen[key] = choose(*key).backend
    return name


# What torch.compiler.assume_constant_result sets; calling that here would import Dynamo, two seconds, with the package.
_by_kind._dynamo_marked_constant = True  # type: ignore[attr-defined]
_by_width._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reset() -> None:
    """Forget what was chosen and what the tuning tables said: both are looked up anew."""
    _chosen.clear()
    tuning.state.cache_clear()
