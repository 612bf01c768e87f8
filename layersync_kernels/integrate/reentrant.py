"""`mode="reentrant"`: the alignment of blocks that run under reentrant checkpoints.

A reentrant checkpoint (`torch.utils.checkpoint` with `use_reentrant=True`) runs a block without grad in the forward
pass, so that nothing of it is kept, and once more in the backward pass, with grad, to differentiate it on the spot.

What goes wrong: the output that a hook sees in the forward pass has no graph, so a loss made of it trains nothing. The
output that has one comes to be while the backward pass is under way, and by then the loss must have been computed.

What this file does: `carrier` differentiates the loss with respect to the student's tokens at once, and the student's
hook puts an `entry` on the block's output whenever that has a graph: an identity whose backward pass adds the gradient
that is waiting to what comes from the rest of the model. The two meet because the loss that the trainer gets is a node
of its own. Autograd runs the newest nodes of a device first, so that node runs before those of the model, learns by
what factor the loss was multiplied (loss scaling, accumulation), and puts the gradients where entries look: into
`_ARRIVED`. A backward pass in which they did not meet raises.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

_keys = itertools.count()
_ARRIVED: dict[int, tuple[_Alignment, Tensor]] = {}


class _Alignment:
    """The gradients that one `loss()` adds, by key of an entry, in units of `unit`, a power of two."""

    def __init__(self, gradients: dict[int, Tensor], unit: float) -> None:
        self.waiting = gradients
        self.unit = unit

    def arrive(self, grad: Tensor) -> None:
        """The loss's node ran: its entries may add their gradients, times `grad`."""
        taken = [key for key in self.waiting if key in _ARRIVED]
        if taken:
            raise RuntimeError(
                "LayerSync: mode='reentrant' takes one loss() in a backward pass; backpropagate each by itself"
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
                "LayerSync: mode='reentrant' could not add the alignment's gradient, as the student block took no part "
                "in this backward pass after the loss did: backpropagate loss() together with the task's loss, once, "
                "and make sure that something up to the student is trained"
            )


def new_key() -> int:
    """A key for a pair's entry."""
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


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(hidden: Tensor, key: int) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.key = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _add_alignment(grad, ctx.key) if torch.compiler.is_compiling() else _add(grad, ctx.key), None


def entry(hidden: Tensor, key: int) -> Tensor:
    """The student's tensor, where the alignment's gradient enters its backward pass."""
    return _Entry.apply(hidden, key)


class _Carrier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, alignment: _Alignment) -> Tensor:
        ctx.alignment = alignment
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.alignment.arrive(grad)
        return None, None, None


def carrier(loss: Tensor, students: Mapping[int, Tensor], *, mean: bool) -> Tensor:
    """The loss as a scalar whose backward pass makes the entries add their gradients.

    Args:
        loss: 0-d, on the model's device: autograd runs the nodes of a device newest first. Differentiated here.
        students: key of an entry → the tokens that the loss was made of, leaves.
        mean: whether the loss is a mean over tokens; else a sum.
    """
    # In units in which a half-precision gradient does not underflow; the incoming factor takes them out again.
    tokens = max(student.numel() // student.shape[-1] for student in students.values())
    unit = 2.0 ** -(tokens.bit_length() if mean else 0)
    gradients = torch.autograd.grad(loss / unit, list(students.values()))
    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    return _Carrier.apply(anchor, loss.detach(), _Alignment(dict(zip(students, gradients, strict=True)), unit))
