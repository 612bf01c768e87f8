"""The mathematics in plain PyTorch: oracle of the tests, last fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cosine_alignment import cosine_alignment_reference


def gated_residual_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    student: Tensor | None,
    *,
    norm: bool,
    rms: bool,
    eps: float,
    align_eps: float,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """R = x + gate·branch; y = norm(r)·(1 + scale) + shift; cosine(student, r). Arithmetic in fp32, fp64 for fp64.

    Args:
        x: (..., D) residual stream; r has its dtype.
        branch: (..., D), or None: r is x.
        gate: broadcastable to x, or None for ones.
        shift: broadcastable to x, or None for zeros.
        scale: broadcastable to x, or None for zeros.
        student: (..., D), or None: no cosine.
        norm: whether y is wanted.
        rms: divide by the root mean square instead of subtracting the mean and dividing by the standard deviation.
        eps: added to the variance, or to the mean square.
        align_eps: a token whose norm is below it has cosine 0 and gradient 0.
        dtype: of y.
        bias: (D,), already part of the branch: gets its gradient, summed over tokens; or None.

    Returns:
        (r, y or None, cosine (...) or None).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    residual = x
    if branch is not None:
        if bias is not None:
            branch = branch + (bias - bias.detach()).to(branch.dtype)
        update = branch.to(wide) if gate is None else gate.to(wide) * branch.to(wide)
        residual = (x.to(wide) + update).to(x.dtype)
    normed = cosine = None
    if norm:
        r = residual.to(wide)
        if not rms:
            r = r - r.mean(dim=-1, keepdim=True)
        normed = r * torch.rsqrt(r.square().mean(dim=-1, keepdim=True) + eps)
        if scale is not None:
            normed = normed * (1 + scale.to(wide))
        if shift is not None:
            normed = normed + shift.to(wide)
        normed = normed.to(dtype)
    if student is not None:
        cosine = -cosine_alignment_reference(student, residual, None, align_eps, "none", teacher_grad=False)
    return residual, normed, cosine
