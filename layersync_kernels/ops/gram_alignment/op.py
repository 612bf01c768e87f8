"""gram_alignment: the mean of f(|S - T|), S and T the cosines of all pairs of student tokens and of teacher tokens.

Story of the op: S, T and the gradient G of the terms with respect to S exist a strip of rows at a time (strips.py). The
forward pass makes the student's gradient on the way, so that no cosine is computed twice, and keeps it: in fp32, as it
waits for its factor. The backward pass multiplies by what comes in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import raw_op
from ..autograd import FusedFunction, differentiable_once
from ..registry import COMPOSITE, Op, register
from .reference import gram_alignment_reference

register(
    Op(
        "gram_alignment",
        ("gram_alignment_loss",),
        gram_alignment_reference,
        uncompiled="it keeps the matrices of cosines that the op exists to avoid",
    )
)

KINDS = {"relu": 0, "square": 1, "abs": 2}


def _fake(
    student: Tensor, teacher: Tensor, mask: Tensor | None, margin: float, kind: int, eps: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    values = student.new_empty(student.shape[:-2], dtype=torch.float32)
    return values, student.new_empty(student.shape if gradient else (0,), dtype=torch.float32)


def _fake_strip(difference: Tensor, diagonal: int, margin: float, kind: int, gradient: Tensor | None) -> Tensor:
    return difference.new_empty(difference.shape[:-1], dtype=torch.float32)


# mask: (..., N) bool or None. kind: see KINDS. Returns the value of each sample and, contiguous, the gradient of their
# sum with respect to the student, or (0,) where it is not wanted; both fp32.
GRAM = raw_op.declare(
    "gram_alignment",
    _fake,
    kind=COMPOSITE,
    python={"cpp": "strips:run_cpp", "cuda": "strips:run_cuda", "triton": "triton:run"},
)
# difference: (samples, rows, columns), contiguous. Returns the sums of f(|difference|) over each row, (samples, rows)
# float32: the first `diagonal` columns once, the others, which stand for their mirror images too, twice. Writes the
# derivative of each term into `gradient`, which may be `difference`: float32, on a GPU of the dtype of the differences.
STRIP = raw_op.declare(
    "gram_alignment_strip", _fake_strip, kind="alignment", backends=("cpp", "cuda"), mutates=("gradient",)
)


class GramAlignment(FusedFunction):
    """The op with its gradient. Saves the student's gradient, in fp32."""

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        margin: float,
        kind: int,
        eps: float,
        gradient: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """(values, gradient) of the raw op."""
        return GRAM[backend](student, teacher, mask, margin, kind, eps, gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward pass reads."""
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[1])  # the student for its dtype, and for second derivatives to fail

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """The gradient of the student."""
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 8
        student, gradient = ctx.saved_tensors
        d_student = (gradient * grad[..., None, None]).to(student.dtype)
        return differentiable_once(d_student, grad, student), *(None,) * 7


def gram_alignment(
    student: Tensor, teacher: Tensor, mask: Tensor | None, margin: float, kind: str, eps: float, backend: str
) -> Tensor:
    """Run the op on a resolved backend. Arguments as the reference's."""
    gradient = student.requires_grad and torch.is_grad_enabled()
    values, _ = GramAlignment.run(student, teacher, mask, margin, KINDS[kind], eps, gradient, backend)
    return values
