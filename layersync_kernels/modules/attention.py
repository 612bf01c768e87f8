"""Self-attention over packed queries, keys and values."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import self_attention
from .norm import HeadNorm
from .rope import rotate


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
