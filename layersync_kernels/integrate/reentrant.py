"""`mode="tap"`: an identity on the student whose backward pass adds the alignment's gradient.

Under a reentrant checkpoint the first pass of a block has no graph, so nothing that is captured there can be
differentiated. The tap is applied again when the block runs again in the backward pass, and finds there the gradient
that `loss()` has computed. It waits in `_ARRIVED` from the moment when the loss's own node, which autograd runs before
the older ones of the model, learns by what factor the loss was multiplied.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

_keys = itertools.count()
_ARRIVED: dict[int, tuple[_Alignment, Tensor]] = {}


class _Alignment:
    """The gradients that one `loss()` adds, by tap, in units of `unit`."""

    def __init__(self, gradients: dict[int, Tensor], unit: float) -> None:
        self.waiting = gradients
        self.unit = unit

    def arrive(self, grad: Tensor) -> None:
        """The loss's node ran: its taps may add their gradients, times `grad`."""
        taken = [key for key in self.waiting if key in _ARRIVED]
        if taken:
            raise RuntimeError(
                "LayerSync: mode='tap' takes one loss() in a backward pass; backpropagate each by itself"
            )
        self.left = set(self.waiting)
        for key, gradient in self.waiting.items():
            _ARRIVED[key] = (self, gradient * (grad * self.unit).to(gradient.dtype))
        Variable._execution_engine.queue_callback(self.leave)

    def leave(self) -> None:
        """The backward pass is over."""
        for key in self.waiting:
            _ARRIVED.pop(key, None)
        if self.left:
            raise RuntimeError(
                "LayerSync: mode='tap' could not add the alignment's gradient, as the student block took no part in "
                "this backward pass after the loss did: backpropagate loss() together with the task's loss, once, and "
                "make sure that something up to the student is trained"
            )


def new_key() -> int:
    """A key for a pair's tap."""
    return next(_keys)


def _add(grad: Tensor, key: int) -> Tensor:
    if key not in _ARRIVED:  # the loss is not part of this backward pass
        return grad
    alignment, gradient = _ARRIVED[key]
    alignment.left.discard(key)
    return grad + gradient


@torch.library.custom_op("layersync::add_alignment", mutates_args=())
def _add_alignment(grad: Tensor, key: int) -> Tensor:
    """`_add` for compiled graphs, which must not look inside."""
    total = _add(grad, key)
    return total.clone() if total is grad else total


@_add_alignment.register_fake
def _(grad: Tensor, key: int) -> Tensor:
    return torch.empty_like(grad)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(hidden: Tensor, key: int) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.key = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _add_alignment(grad, ctx.key) if torch.compiler.is_compiling() else _add(grad, ctx.key), None


def tap(hidden: Tensor, key: int) -> Tensor:
    """The student's tensor, with its tap."""
    return _Tap.apply(hidden, key)


class _Token(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, alignment: _Alignment) -> Tensor:
        ctx.alignment = alignment
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.alignment.arrive(grad)
        return None, None, None


def token(value: Tensor, gradients: dict[int, Tensor], unit: float) -> Tensor:
    """The loss as a scalar whose gradient makes the taps add theirs.

    Args:
        value: 0-d, on the model's device: autograd runs the nodes of a device newest first.
        gradients: by key, of value / unit.
        unit: a power of two.
    """
    anchor = torch.zeros((), device=value.device, requires_grad=True)
    return _Token.apply(anchor, value, _Alignment(gradients, unit))
