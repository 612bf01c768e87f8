"""Declares what a kernel computes once for every backend.

Each backend has a dispatcher namespace of its own (layersync_cpp, layersync_cuda, layersync_triton, and layersync_quack
for that library's products) with the same schema and the same fake, so a compiled graph records which kernel it calls
and a missing one explains itself. What the library computes on every device is in the namespace layersync. The raw ops
carry no autograd formula and are not public: each op's `autograd.Function` stands outside.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch

from .registry import FUSED_BACKENDS, Beside, RawOp, register_raw

LIBRARY = "library"
# The CPU kernel of Triton's is its interpreter's: with TRITON_INTERPRET=1 the same source runs on host tensors.
_DISPATCH_KEYS = {
    "cpp": ("CPU",),
    "cuda": ("CUDA",),
    "triton": ("CPU", "CUDA"),
    "quack": ("CUDA",),
    LIBRARY: ("CompositeExplicitAutograd",),
}


def infer_schema(fake: Callable[..., Any], mutates: Collection[str] = (), symbolic: Collection[str] = ()) -> str:
    """The schema of a typed function: as torch infers it, but that an int is an `int` where it is not `symbolic`.

    torch makes a SymInt of every int, and a compiler would then carry the number of heads, or which reduction it is, as
    unknowns.
    """
    schema = torch.library.infer_schema(fake, mutates_args=mutates)
    return re.sub(r"SymInt (\w+)", lambda match: match[0] if match[1] in symbolic else f"int {match[1]}", schema)


def declare(
    name: str,
    fake: Callable[..., Any],
    *,
    kind: str,
    backends: tuple[str, ...] = FUSED_BACKENDS,
    python: Mapping[str, str] = MappingProxyType({}),
    kept: bool = False,
    mutates: Collection[str] = (),
    symbolic: Collection[str] = (),
    beside: Beside | None = None,
) -> dict[str, Any]:
    """Define `layersync_<backend>::<name>` for every fused backend, or for those given, and enter it in the registry.

    Args:
        name: name of the raw op.
        fake: shapes and dtypes of the results, for tracing. Its signature is the schema; its module is in the folder of
            the op.
        kind: see `RawOp`.
        backends: those that have it; `(LIBRARY,)` for one that runs on every device.
        python: backend → "module:function" in the folder of the op, imported at the first call. The other backends'
            kernels are registered by the compiled library.
        kept: see `RawOp`.
        mutates: the arguments that it writes to.
        symbolic: the ints that follow from the shapes of tensors.
        beside: see `RawOp`.

    Returns:
        backend name → callable overload.
    """
    schema = infer_schema(fake, mutates, symbolic)
    op = fake.__module__.removeprefix(f"{__package__}.").partition(".")[0]
    overloads = {}
    for backend in backends:
        namespace = "layersync" if backend == LIBRARY else f"layersync_{backend}"
        torch.library.define(f"{namespace}::{name}", schema)
        torch.library.register_fake(f"{namespace}::{name}", fake)
        overloads[backend] = getattr(getattr(torch.ops, namespace), name).default
    raw = register_raw(RawOp(name, op, schema, overloads, kind, kept, python, beside))
    for backend in python:
        for key in _DISPATCH_KEYS[backend]:
            torch.library.impl(overloads[backend].name(), key)(_by_name(raw, backend))
    return overloads


def _by_name(raw: RawOp, backend: str) -> Callable[..., Any]:
    implementation = functools.cache(raw.implementation)

    def call(*args: Any) -> Any:
        return implementation(backend)(*args)

    return call
