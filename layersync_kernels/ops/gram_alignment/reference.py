"""The mathematics in plain PyTorch: oracle of the tests, last fallback. Keeps several (N, N) tensors a sample."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ..cosine_alignment.reference import unit_rows


def gram_alignment_reference(
    student: Tensor, teacher: Tensor, mask: Tensor | None, margin: float, kind: str, eps: float
) -> Tensor:
    """The mean of f(|S - T|) over all pairs of valid tokens, for each sample; in fp32, or fp64 for fp64 inputs.

    Args:
        student: (..., N, D1), whose rows have the cosines S.
        teacher: (..., N, D2), whose rows have the cosines T; a constant.
        mask: bool, (..., N), or None. Tokens that it leaves out are not looked at; a sample without any gives 0.
        margin: differences below it count nothing.
        kind: "relu", "square" or "abs".
        eps: a row whose norm is below it has cosine 0 with all rows, also with itself, and gradient 0.
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    if mask is not None:
        student, teacher = (x.masked_fill(~mask.unsqueeze(-1), 0) for x in (student, teacher))
    autocast = student.device.type != "meta"  # where torch knows none
    with torch.autocast(student.device.type, enabled=False) if autocast else nullcontext():
        student, teacher = unit_rows(student, eps), unit_rows(teacher, eps)
        distance = (student @ student.mT - teacher @ teacher.mT).abs()
    if kind == "abs":
        terms = torch.where(distance <= margin, 0, distance)  # a NaN stays
    else:
        terms = (distance - margin).relu()
        terms = terms.square() if kind == "square" else terms
    valid = student.new_full(student.shape[:-2], student.shape[-2]) if mask is None else mask.sum(-1).to(dtype)
    return terms.sum(dim=(-2, -1)) / valid.square().clamp(min=1)
