"""The mathematics in plain PyTorch: oracle of the tests, last fallback."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """gelu_tanh(x·Wᵀ + b): x (..., I), weight (O, I), bias (O,) → (..., O)."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def gelu_mlp_reference(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> Tensor:
    """Linear, tanh-GELU, linear: (..., I) → (..., O)."""
    return F.linear(linear_gelu_reference(x, weight1, bias1), weight2, bias2)
