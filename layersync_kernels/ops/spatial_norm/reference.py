"""The mathematics in plain PyTorch: oracle of the tests, last fallback."""

from __future__ import annotations

import torch
from torch import Tensor


def spatial_norm_reference(x: Tensor, alpha: float, eps: float) -> Tensor:
    """(x - alpha·mean) / (std + eps) over the tokens: x (B, N, D) → the same, with fp32 statistics (fp64 for fp64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    std, mean = torch.std_mean(wide, dim=1, keepdim=True)
    return ((wide - alpha * mean) / (std + eps)).to(x.dtype)
