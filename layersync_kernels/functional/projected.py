"""A projector's last layer with the alignment behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import dispatch
from ..ops.cosine_alignment import cosine_alignment
from ..ops.projected_alignment import linear_rows, projected_alignment, projected_alignment_reference
from .checks import check_positive, check_reduction, check_tokens, flat_weights, linear_inputs, row_weights


def projected_alignment_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """`layersync_loss(F.linear(hidden, weight, bias), teacher)`: a projector's last layer with the alignment behind it.

    The projected tokens never exist as a whole: they and their gradient live a chunk of rows at a time. For "mean" and
    "sum" the gradients come with the loss in one go and wait for the backward pass, which scales them.

    Args:
        hidden: (..., D) tokens, usually (B, N, D).
        weight: (P, D).
        bias: (P,) or None.
        teacher: (..., P) tokens, one for each of hidden's; a constant, of any floating dtype.
        mask: bool, True for tokens that count, broadcast as in `layersync_loss`. Masked tokens may hold NaN.
        token_weight: float weight of each token, shaped like `mask`; multiplied with it. It is not differentiated.
        reduction: "mean" (over the sum of weights; 0 where everything is masked), "sum" (the weighted sum), or "none"
            (−w·cos per token).
        eps: a token whose norm, projected or the teacher's, is below it has cosine 0 and gradient 0.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        fp32 (fp64 for fp64 inputs): a 0-d tensor, or the leading dimensions for "none". Under autocast the projection
        runs in the autocast dtype, as that of `F.linear`.

    Raises:
        ValueError: shapes or devices that do not fit, among them another number of tokens or another width of the
            teacher; otherwise as `layersync_loss`.
        TypeError: hidden, weight and bias of several dtypes outside autocast; otherwise as `layersync_loss`.
        RuntimeError: as `layersync_loss`.

    Source: the alignment term of REPA (Yu et al. 2024, arXiv:2410.06940) with the last layer of its projector.
    """
    op = "projected_alignment_loss"
    x, (projection,), (offset,), name = linear_inputs(op, hidden, (weight,), (bias,), backend, "hidden")
    check_tokens(op, "teacher", teacher, hidden, "hidden")
    check_reduction(op, reduction)
    check_positive(op, "eps", eps)
    if teacher.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"{op}: teacher {tuple(teacher.shape)} has {teacher.shape[-1]} channels and weight {tuple(weight.shape)} "
            f"projects to {weight.shape[0]}; give a weight of shape ({teacher.shape[-1]}, {hidden.shape[-1]})"
        )
    if teacher.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: hidden {tuple(hidden.shape)} and teacher {tuple(teacher.shape)} must have the same tokens: "
            f"{tuple(hidden.shape[:-1])} is not {tuple(teacher.shape[:-1])}; drop extra tokens, or interpolate the "
            "teacher's to hidden's grid"
        )
    row_weight = row_weights(op, hidden, mask, token_weight)
    if teacher.dtype == torch.float64:
        name = dispatch.resolve(op, backend, hidden.device.type, torch.float64)
    if name == "reference" or hidden.numel() == 0 or teacher.numel() == 0:
        return projected_alignment_reference(hidden, weight, bias, teacher, row_weight, eps, reduction)
    row_weight = flat_weights(row_weight, hidden)
    teacher = teacher.detach()
    tokens = hidden.numel() // hidden.shape[-1]
    if backend == "auto" and tokens <= linear_rows(weight.shape[0], x.dtype, x.device.type):
        # There is little memory to save. Linear layer and fused cosine are faster then: 0.66 ms for 0.87 at
        # 1024 x 96 -> 112 in fp32, 0.13 for 0.27 where the calls are all there is.
        if row_weight is not None:  # what is masked may be NaN
            x = x.masked_fill((row_weight == 0).view(*hidden.shape[:-1], 1), 0)
        return cosine_alignment(F.linear(x, projection, offset), teacher, row_weight, eps, reduction, False, name)
    return projected_alignment(x, projection, offset, teacher, row_weight, eps, reduction, name)
