"""cosine_alignment: loss = −Σ w·c / Σ w with c = ⟨s, t⟩ / (‖s‖‖t‖) per row.

Story of the op: the forward pass reads student and teacher once (2 MD) and keeps 12 bytes a row (the cosine and both
reciprocal norms) and one scale; the backward pass reads both again and writes the gradient (3 MD):

    dL/ds = −g·w·scale · (t/‖t‖ − c·s/‖s‖) / ‖s‖,    scale = 1/Σw for the mean, else 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import raw_op
from ..autograd import FusedFunction, differentiable_once
from ..registry import Op, register
from .reference import cosine_alignment_reference

register(Op("cosine_alignment", ("layersync_loss",), cosine_alignment_reference, uncompiled=None))

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _fake_forward(
    student: Tensor, teacher: Tensor, weight: Tensor | None, eps: float, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    leading = student.shape[:-1]
    rows = 1
    for extent in leading:
        rows = rows * extent
    loss = student.new_empty(leading if reduction == REDUCTIONS["none"] else (), dtype=torch.float32)
    return loss, student.new_empty((3, rows), dtype=torch.float32), student.new_empty((), dtype=torch.float32)


def _fake_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    scale: Tensor,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, Tensor]:
    return (
        student.new_empty(student.shape if student_grad else (0,)),
        teacher.new_empty(teacher.shape if teacher_grad else (0,)),
    )


def _fake_in_place(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    eps: float,
    scale: float,
    reduction: int,
    summed: bool,
) -> tuple[Tensor, Tensor]:
    loss = student.new_empty(student.shape[:-1] if reduction == REDUCTIONS["none"] else (), dtype=torch.float32)
    return loss, student.new_empty((1, student.shape[-1]) if summed else (0,), dtype=torch.float32)


# weight: (M,) contiguous float32 or None. reduction: see REDUCTIONS. Returns (loss, stats (3, M), scale ()), all fp32.
FORWARD = raw_op.declare(
    "cosine_alignment_forward", _fake_forward, kind="alignment", python={"triton": "triton:forward"}
)
# grad: the gradient of the loss, () or (leading), fp32. Returns both gradients, contiguous; an unwanted one is empty.
BACKWARD = raw_op.declare(
    "cosine_alignment_backward", _fake_backward, kind="alignment", python={"triton": "triton:backward"}
)
# Both passes in one, for a student (contiguous) that nothing else needs: its gradient, times `scale`, takes its place.
# grad as above. Returns the loss and, where wanted, the sum of that gradient over the rows, fp32.
IN_PLACE = raw_op.declare(
    "cosine_alignment_in_place", _fake_in_place, kind="alignment", backends=("cpp",), mutates=("student",)
)


class CosineAlignment(FusedFunction):
    """The fused op with its gradient. Saves its inputs (alive anyway), 12 bytes a row and one float."""

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        weight: Tensor | None,
        eps: float,
        reduction: int,
        teacher_grad: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, stats, scale) of the raw op."""
        return FORWARD[backend](student, teacher, weight, eps, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep what the backward pass reads."""
        student, teacher, weight, _, _, teacher_grad, backend = inputs
        _, stats, scale = output
        ctx.mark_non_differentiable(stats, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, weight, stats, scale)
        ctx.teacher_grad = teacher_grad
        ctx.backend = backend

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of student and teacher, as far as wanted."""
        student_grad = ctx.needs_input_grad[0]
        teacher_grad = ctx.needs_input_grad[1] and ctx.teacher_grad
        if grad is None or not (student_grad or teacher_grad):
            return (None,) * 7
        student, teacher, weight, stats, scale = ctx.saved_tensors
        gradients = BACKWARD[ctx.backend](grad, student, teacher, weight, stats, scale, student_grad, teacher_grad)
        d_student, d_teacher = (
            differentiable_once(gradient, grad, student, teacher) if wanted else None
            for gradient, wanted in zip(gradients, (student_grad, teacher_grad), strict=True)
        )
        return d_student, d_teacher, None, None, None, None, None


def cosine_alignment(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    eps: float,
    reduction: str,
    teacher_grad: bool,
    backend: str,
) -> Tensor:
    """Run the fused op on a resolved backend. Arguments as the reference's, but weight (M,) float32."""
    loss, _, _ = CosineAlignment.run(student, teacher, weight, eps, REDUCTIONS[reduction], teacher_grad, backend)
    return loss
