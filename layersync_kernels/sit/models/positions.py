"""Positions of the patches."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_positions(hidden_size: int, grid: int) -> Tensor:
    """Fixed 2-D positions (grid², D): a quarter each of sin and cos of the column, then of the row (as in MAE)."""
    frequency = 10_000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = axis.expand(grid, -1, -1)
    return torch.cat([column, column.transpose(0, 1)], dim=2).flatten(0, 1)
