"""Declares an op once for every backend.

Each backend has a dispatcher namespace of its own (layersync_cpp, layersync_cuda, layersync_triton) with the same
schema and the same fake, so a compiled graph records which kernel it calls and a missing one explains itself. The raw
ops carry no autograd formula and are not public: each op's `autograd.Function` stands outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FUSED_BACKENDS = ("cpp", "cuda", "triton")


def declare(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None,
    backends: tuple[str, ...] = FUSED_BACKENDS,
) -> dict[str, Any]:
    """Define `layersync_<backend>::<name>` for every fused backend, or for those given.

    Args:
        name: name of the op.
        schema: its argument list and returns, e.g. "(Tensor x, float eps) -> Tensor".
        fake: shapes and dtypes of the outputs, for tracing.
        triton: the launcher of the Triton kernel, imported lazily by the caller; None where "triton" is not among
            `backends`.
        backends: those that have the op.

    Returns:
        backend name → callable overload.
    """
    overloads = {}
    for backend in backends:
        qualified = f"layersync_{backend}::{name}"
        torch.library.define(qualified, schema)
        torch.library.register_fake(qualified, fake)
        overloads[backend] = getattr(getattr(torch.ops, f"layersync_{backend}"), name).default
    if triton is not None:
        # The CPU kernel is the interpreter's: with TRITON_INTERPRET=1 the same source runs on host tensors.
        torch.library.impl(f"layersync_triton::{name}", ("cpu", "cuda"))(triton)
    return overloads
