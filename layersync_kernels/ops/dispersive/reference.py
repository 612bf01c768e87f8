"""The mathematics in plain PyTorch: oracle of the tests, and the eager baseline."""

from __future__ import annotations

import torch
from torch import Tensor


def dispersive_loss_reference(hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """Log of the mean over all pairs (i, j) of exp(−‖hᵢ − hⱼ‖² / (K·temperature)), K elements a sample; B > 0, K > 0.

    Args:
        hidden: (B, ...); arithmetic in fp32, or fp64 for fp64 inputs.
        temperature: what distances are measured by.
    """
    hidden = hidden.flatten(1).to(torch.promote_types(hidden.dtype, torch.float32))
    distances = torch.pdist(hidden).square() / (hidden.shape[1] * temperature)
    pairs = torch.cat([distances, distances, distances.new_zeros(hidden.shape[0])])
    return (-pairs).exp().mean().log()
