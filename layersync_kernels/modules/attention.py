"""Self-attention over packed queries, keys and values, and its rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import attention, qk_norm_rope, self_attention
from ..ops.attention import masked_attention
from .linear import lent_bias, linear

_EPS = 1e-6
"""Of the norms of queries and keys."""


class Attention(nn.Module):
    """Multi-head self-attention, optionally with RMS-normed queries and keys and rotary positions.

    Args:
        hidden_size: D.
        num_heads: heads, which divide D.
        qk_norm: RMSNorm of queries and keys over the channels of a head, each with a weight.

    Raises:
        ValueError: heads that do not divide D.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = _checked_heads("Attention", hidden_size, num_heads)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm = nn.RMSNorm(hidden_size // num_heads, eps=_EPS) if qk_norm else None
        self.k_norm = nn.RMSNorm(hidden_size // num_heads, eps=_EPS) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        lend_bias: bool = False,
    ) -> Tensor:
        """Tokens (B, N, D) → (B, N, D).

        Args:
            x: tokens.
            rope: cosines and sines (N, D / heads) of rotary positions, as `rotary_positions` makes them.
            lengths: int64 (B,), tokens of each sample that are there, see `self_attention`; None: all.
            lend_bias: of proj, see `linear.lent_bias`.
        """
        if self.q_norm is None and self.k_norm is None and rope is None:
            bias = lent_bias(self.qkv)
            qkv = linear(self.qkv, x, lend=bias is not None)
            out = self_attention(qkv, self.num_heads, lengths=lengths, bias=bias)
        else:
            out = attention(*self._heads(x, rope), lengths=lengths)
        return linear(self.proj, out, lend=lend_bias)

    def _heads(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normed and turned, and values: (B, heads, N, E) each."""
        q_norm, k_norm = self.q_norm, self.k_norm
        eps: Any = _EPS if q_norm is None else getattr(q_norm, "eps", None)
        plain = type(q_norm) is type(k_norm) and type(q_norm) in (nn.RMSNorm, type(None))
        alike = plain and eps is not None and (k_norm is None or k_norm.eps == eps)
        if not alike or (rope is not None and any(part.requires_grad or part.dim() != 2 for part in rope)):
            return self._heads_one_by_one(x, rope)
        bias = lent_bias(self.qkv)
        qkv = linear(self.qkv, x, lend=bias is not None)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        q_weight, k_weight = (None if norm is None else norm.weight for norm in (q_norm, k_norm))
        cos, sin = (None, None) if rope is None else (part.to(wide) for part in rope)
        return qk_norm_rope(qkv, q_weight, k_weight, cos, sin, self.num_heads, eps, bias=bias)

    def _heads_one_by_one(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same of what the op does not take: other modules as norms, norms that differ, learnt positions."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = (part if norm is None else norm(part) for part, norm in ((q, self.q_norm), (k, self.k_norm)))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q.to(v.dtype), k.to(v.dtype), v


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to words, by torch's `scaled_dot_product_attention`; at first it returns 0.

    Args:
        hidden_size: D.
        num_heads: heads, which divide D.

    Raises:
        ValueError: heads that do not divide D.

    Source: PixArt-alpha (Chen et al. 2023, arXiv:2310.00426), whose parameters have these names.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = _checked_heads("CrossAttention", hidden_size, num_heads)
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(
        self, x: Tensor, text: Tensor, *, lengths: Tensor | None = None, text_lengths: Tensor | None = None
    ) -> Tensor:
        """Tokens x (B, N, D) and words text (B, L, D) → (B, N, D).

        Args:
            x: tokens.
            text: words.
            lengths: int64 (B,), tokens of each sample that are there; None: all.
            text_lengths: int64 (B,), the same of the words.
        """
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(masked_attention(q, k, v, lengths, text_lengths).transpose(1, 2).flatten(2))


def _checked_heads(module: str, hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise ValueError(f"{module}: num_heads={num_heads} does not divide hidden_size={hidden_size}")
    return num_heads


def rotary_positions(
    extent: Sequence[int], head_width: int, *, base: float = 10_000.0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions for tokens in one, two or three dimensions, the last one fastest.

    Each dimension turns as many of a head's channels, the first ones also what does not divide; neighbouring channels
    are a pair.

    Args:
        extent: tokens along each dimension; N is their product.
        head_width: channels of a head, a multiple of 2, and with two dimensions of 4.
        base: of the geometric frequencies.
        device: of the results.

    Returns:
        two (N, head_width) fp32 tensors.

    Raises:
        ValueError: a head width that does not fit.

    Source: Su et al. 2021, arXiv:2104.09864, in several dimensions as in EVA-02 (Fang et al. 2023, arXiv:2303.11331).
    """
    dimensions = len(extent)
    unit = 4 if dimensions == 2 else 2
    if head_width % unit or head_width < 2 * dimensions:
        raise ValueError(
            f"rotary_positions: head_width={head_width}; expected a multiple of {unit}, at least {2 * dimensions}, for "
            f"{dimensions} dimensions"
        )
    pairs = [head_width // 2 // dimensions + (i < head_width // 2 % dimensions) for i in range(dimensions)]
    angles = []
    for i, (size, count) in enumerate(zip(extent, pairs, strict=True)):
        frequency = base ** -(torch.arange(count, dtype=torch.float32, device=device) / count)
        angle = (torch.arange(size, dtype=torch.float32, device=device)[:, None] * frequency).repeat_interleave(
            2, dim=1
        )
        shape = [size if j == i else 1 for j in range(dimensions)]
        angles.append(angle.view(*shape, -1).expand(*extent, -1))
    turned = torch.cat(angles, dim=-1).flatten(0, -2)
    return turned.cos(), turned.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs of neighbouring channels of x (..., N, E) by the angles of cos and sin (N, E)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin
