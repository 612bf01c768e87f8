"""Rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_2d(grid: int, head_width: int, *, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions for a square grid of tokens, row after row.

    Half of a head's channels turn with the row, half with the column; neighbouring channels are a pair.

    Args:
        grid: side of the grid; N = grid².
        head_width: channels of a head, a multiple of 4.
        base: of the geometric frequencies.

    Returns:
        two (N, head_width) fp32 tensors.

    Raises:
        ValueError: a head width that is no multiple of 4.

    Source: Su et al. 2021, arXiv:2104.09864, in two dimensions as in EVA-02 (Fang et al. 2023, arXiv:2303.11331).
    """
    if head_width % 4:
        raise ValueError(f"rope_2d: head_width={head_width}; expected a multiple of 4")
    frequency = base ** -(torch.arange(0, head_width // 2, 2, dtype=torch.float32) / (head_width // 2))
    angle = (torch.arange(grid, dtype=torch.float32)[:, None] * frequency).repeat_interleave(2, dim=1)
    row, column = angle[:, None].expand(-1, grid, -1), angle[None].expand(grid, -1, -1)
    angles = torch.cat([row, column], dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs of neighbouring channels of x (..., N, E) by the angles of cos and sin (N, E)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin
