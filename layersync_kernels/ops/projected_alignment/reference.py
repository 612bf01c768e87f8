"""The mathematics in plain PyTorch: oracle of the tests, last fallback."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..cosine_alignment import cosine_alignment_reference


def projected_alignment_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    row_weight: Tensor | None,
    eps: float,
    reduction: str,
) -> Tensor:
    """`cosine_alignment_reference` of hidden·Wᵀ + b and a constant teacher.

    Args:
        hidden: (..., D).
        weight: (P, D).
        bias: (P,) or None.
        teacher: (..., P).
        row_weight: as the weight there.
        eps: as there.
        reduction: as there.
    """
    if row_weight is not None:  # a masked row may hold NaN, which 0·NaN would carry into the gradient of the weight
        hidden = hidden.masked_fill((row_weight == 0).expand(hidden.shape[:-1]).unsqueeze(-1), 0)
    return cosine_alignment_reference(
        F.linear(hidden, weight, bias), teacher, row_weight, eps, reduction, teacher_grad=False
    )
