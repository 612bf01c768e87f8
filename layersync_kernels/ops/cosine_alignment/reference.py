"""The mathematics in plain PyTorch: oracle of the tests, eager baseline of the benchmarks, last fallback."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(x: Tensor, eps: float) -> Tensor:
    """Rows x / ‖x‖ over the last dimension; rows with ‖x‖ < eps become zero, with zero gradient."""
    if x.shape[-1] == 0:
        return x
    # Scaling by the largest element keeps the squares of rows near 1e30 in range.
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    small = norm.detach() * largest < eps  # False for NaN, which has to show
    return torch.where(small, 0, x / torch.where(small, 1, norm))


def cosine_alignment_reference(
    student: Tensor, teacher: Tensor, weight: Tensor | None, eps: float, reduction: str, teacher_grad: bool
) -> Tensor:
    """−w·cos(student, teacher) per row, its sum, or its weighted mean; arithmetic in fp32, or fp64 for fp64 inputs.

    Args:
        student: (..., D).
        teacher: (..., D), same shape.
        weight: broadcastable to the leading dimensions, or None for ones. Rows of weight 0 are not looked at.
        eps: a row whose norm is below it has cosine 0 and gradient 0.
        reduction: "none", "sum" or "mean" (over the sum of weights; 0 where that is 0).
        teacher_grad: whether the teacher is differentiated too.
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student = student.to(dtype)
    teacher = (teacher if teacher_grad else teacher.detach()).to(dtype)
    if weight is not None:
        weight = weight.to(dtype).expand(student.shape[:-1])
        masked = (weight == 0).unsqueeze(-1)
        student, teacher = student.masked_fill(masked, 0), teacher.masked_fill(masked, 0)
    return reduce_rows((unit_rows(student, eps) * unit_rows(teacher, eps)).sum(dim=-1), weight, reduction)


def reduce_rows(cosine: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """−w·cosine per row ("none"), its "sum", or its "mean" over the sum of weights (0 where that is 0).

    Args:
        cosine: (...), one per row.
        weight: the same shape, or None for ones. The cosine of a row of weight 0 does not matter and may be NaN.
        reduction: "none", "sum" or "mean".
    """
    terms = cosine if weight is None else torch.where(weight == 0, 0, weight * cosine)
    if reduction == "none":
        return -terms
    if reduction == "sum":
        return -terms.sum()
    if weight is None:
        return -terms.mean() if terms.numel() else -terms.sum()
    total = weight.sum()
    return torch.where(total == 0, 0, -terms.sum() / torch.where(total == 0, 1, total))
