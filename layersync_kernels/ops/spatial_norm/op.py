"""spatial_norm as a fused op: one read and one write of the tokens. It serves constants and has no gradient."""

from __future__ import annotations

from torch import Tensor

from .. import raw_op
from ..registry import Op, register
from .reference import spatial_norm_reference

register(Op("spatial_norm", ("spatial_norm",), spatial_norm_reference, differentiable=False, uncompiled=None))


def _fake(x: Tensor, alpha: float, eps: float) -> Tensor:
    return x.new_empty(x.shape)


# x: (B, N, D) at any stride of samples and tokens, N > 1. Returns (x - alpha·mean) / (std + eps), contiguous.
SPATIAL_NORM = raw_op.declare("spatial_norm", _fake, kind="rows", python={"triton": "triton:spatial_norm"})


def spatial_norm(x: Tensor, alpha: float, eps: float, backend: str) -> Tensor:
    """Run the fused op on a resolved backend."""
    return SPATIAL_NORM[backend](x, alpha, eps)
