"""Self-attention over packed queries, keys and values, and its rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import self_attention
from .norm import HeadNorm


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, optionally with RMS-normed queries and keys and rotary positions.

    Args:
        hidden_size: D.
        num_heads: heads, which divide D.
        qk_norm: RMSNorm of queries and keys over the channels of a head, each with a weight.

    Raises:
        ValueError: heads that do not divide D.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"Attention: num_heads={num_heads} does not divide hidden_size={hidden_size}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm = HeadNorm(hidden_size // num_heads) if qk_norm else None
        self.k_norm = HeadNorm(hidden_size // num_heads) if qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Tokens (B, N, D) → (B, N, D).

        Args:
            x: tokens.
            rope: cosines and sines (N, D / heads) of rotary positions, as `rope_2d` makes them.
        """
        qkv = self.qkv(x)
        if self.q_norm is None and rope is None:
            return self.proj(self_attention(qkv, self.num_heads))
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope).to(v.dtype), rotate(k, *rope).to(v.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


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
