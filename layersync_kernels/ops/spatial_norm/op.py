"""spatial_norm as a fused op: one read and one write of the tokens. It serves constants and has no gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import raw_op


def _fake(x: Tensor, alpha: float, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _triton(*args: Any) -> Tensor:
    from . import triton

    return triton.spatial_norm(*args)


# x: (B, N, D) at any stride of samples and tokens, N > 1. Returns (x - alpha·mean) / (std + eps), contiguous.
SPATIAL_NORM = raw_op.declare("spatial_norm", "(Tensor x, float alpha, float eps) -> Tensor", _fake, _triton)


def spatial_norm(x: Tensor, alpha: float, eps: float, backend: str) -> Tensor:
    """Run the fused op on a resolved backend."""
    return SPATIAL_NORM[backend](x, alpha, eps)
