"""Every op, declared once, in its own folder: what dispatch, doctor, the ledger, recompute and the tests read.

An op is a folder here whose `op.py` calls `register` and, for what its kernels compute, `raw_op.declare`. There is no
list of ops: the folders are the list.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

FUSED_BACKENDS = ("cpp", "cuda", "triton")
COMPOSITE = "composite"

_PACKAGE = __package__


class Beside(NamedTuple):
    """What the epilogue of a matrix product moves beside the product's own operands and result.

    Attributes:
        kind: what the traffic ledger counts it as, a key of `compiler.analysis.KINDS`.
        arguments: the names of tensors that it reads.
        results: the places of the results that it writes.
    """

    kind: str
    arguments: tuple[str, ...] = ()
    results: tuple[int, ...] = ()


@dataclass(frozen=True)
class RawOp:
    """What a kernel computes: the same schema and fake for every backend that has it.

    Attributes:
        name: without namespace, e.g. "gelu_forward".
        op: the folder that declares it.
        schema: arguments and results.
        overloads: backend → callable.
        kind: what the traffic ledger counts it as, a key of `compiler.analysis.KINDS`; `COMPOSITE` for one that calls
            other ops, which are counted in its place.
        kept: whether `recompute="light"` keeps its results, as those of matrix products.
        python: backend → "module:function" below the op's folder, for what is no compiled kernel.
        beside: of a matrix product that has more than that in its epilogue.
    """

    name: str
    op: str
    schema: str
    overloads: Mapping[str, Any]
    kind: str
    kept: bool = False
    python: Mapping[str, str] = field(default_factory=dict)
    beside: Beside | None = None

    def implementation(self, backend: str) -> Callable[..., Any]:
        """The Python function behind a backend; imports its module."""
        module, _, function = self.python[backend].partition(":")
        return getattr(importlib.import_module(f"{_PACKAGE}.{self.op}.{module}"), function)


@dataclass(frozen=True)
class Route:
    """Another way through the kernels of a backend: taken by name or by a tuning table, never by rule.

    Attributes:
        backend: whose kernels it needs.
        obstacle: dtype → why it does not run, or None.
        forced: whether the environment asks for it, against any table.
    """

    backend: str
    obstacle: Callable[[torch.dtype], str | None]
    forced: bool = False


@dataclass(frozen=True)
class Op:
    """An op.

    Attributes:
        name: its folder's.
        functions: the public functions that it serves; each takes `backend` where the op has any.
        reference: the mathematics in plain PyTorch.
        backends: the fused ones.
        otherwise: what runs where no kernel of the op does; for an op without backends, everywhere.
        differentiable: whether the kernels have a gradient; else the reference serves calls that ask for one.
        slower: backend → why "auto" passes over one that could run, or None. It is called on the backend's own device.
        uncompiled: why the backend "compile", the reference under torch.compile, is none of the op's; None where it is.
        routes: name → route.
    """

    name: str
    functions: tuple[str, ...]
    reference: Callable[..., Any]
    backends: tuple[str, ...] = FUSED_BACKENDS
    otherwise: str = "the reference"
    differentiable: bool = True
    slower: Callable[[str], str | None] = lambda backend: None
    uncompiled: str | None = "its functions do not offer it"
    routes: Mapping[str, Route] = field(default_factory=dict)

    @property
    def raw_ops(self) -> tuple[RawOp, ...]:
        """What its kernels compute."""
        return tuple({raw.name: raw for raw in _raw_ops.values() if raw.op == self.name}.values())


_ops: dict[str, Op] = {}
_raw_ops: dict[str, RawOp] = {}  # by qualified name


def register(op: Op) -> Op:
    """Enter an op. Called where it is declared.

    Raises:
        ValueError: its name is taken, or it serves a function that another op serves.
    """
    served = {name: other.name for other in _ops.values() for name in (other.name, *other.functions)}
    for name in (op.name, *op.functions):
        if name in served:
            raise ValueError(f"layersync_kernels: op {op.name}: {name} is served by op {served[name]} already")
    _ops[op.name] = op
    return op


def register_raw(raw: RawOp) -> RawOp:
    """Enter a raw op under the qualified name of each of its overloads."""
    for overload in raw.overloads.values():
        _raw_ops[overload.name()] = raw
    return raw


def ops() -> tuple[Op, ...]:
    """All ops, by name. Imports their folders."""
    for module in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        if module.ispkg:
            importlib.import_module(f"{_PACKAGE}.{module.name}.op")
    return tuple(sorted(_ops.values(), key=lambda op: op.name))


def find(name: str) -> Op:
    """The op of a name, or the one that serves the public function of that name.

    Raises:
        KeyError: there is none.
    """
    for candidates in (_ops.values, ops):  # importing the folders only where the name is not known yet
        for op in candidates():
            if name == op.name or name in op.functions:
                return op
    raise KeyError(f"layersync_kernels: no op has or serves the name {name!r}")


def find_raw(qualified: str) -> RawOp | None:
    """The raw op of a qualified name, e.g. "layersync_cpp::gelu_forward"; None for any other op of PyTorch's."""
    return _raw_ops.get(qualified)
