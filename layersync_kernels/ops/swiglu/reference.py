"""The mathematics in plain PyTorch: oracle of the tests, last fallback."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(x12: Tensor, gelu: bool, interleaved: bool) -> Tensor:
    """silu(x1)·x2, or gelu_tanh(x1)·x2: x12 (..., 2·H), as [x1, x2] or as pairs of neighbours → (..., H)."""
    if interleaved:
        gate, value = x12[..., 0::2], x12[..., 1::2]
    else:
        half = x12.shape[-1] // 2
        gate, value = x12[..., :half], x12[..., half:]
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * value


def swiglu_mlp_reference(
    x: Tensor,
    weight12: Tensor,
    bias12: Tensor | None,
    weight3: Tensor,
    bias3: Tensor | None,
    gelu: bool,
    interleaved: bool,
) -> Tensor:
    """Linear, gated linear unit, linear: (..., I) → (..., O)."""
    return F.linear(swiglu_reference(F.linear(x, weight12, bias12), gelu, interleaved), weight3, bias3)
