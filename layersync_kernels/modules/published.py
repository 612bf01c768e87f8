"""The published blocks of DiT, SiT and LightningDiT, op by op: what `AdaLNZeroBlock` computes in single passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compiler.recompute import recomputed
from ..ops.attention import masked_attention
from .attention import CrossAttention, rotate


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The affine map of adaLN, x·(1 + scale) + shift: x (N, T, D), shift and scale (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class RmsNorm(nn.Module):
    """RMSNorm over the last dimension, with a weight; the statistics in fp32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) → the same."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, optionally with an RMSNorm of queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm = RmsNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RmsNorm(hidden_size // num_heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Tokens (N, T, D) → (N, T, D), as `modules.Attention`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k = q.to(v.dtype), k.to(v.dtype)
        return self.proj(masked_attention(q, k, v, lengths, lengths).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) → (N, T, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class GatedMlp(nn.Module):
    """Linear, silu of one half times the other, linear."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * inner_size)
        self.w3 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, D) → (N, T, D)."""
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class SiTBlock(nn.Module):
    """Attention and MLP on a residual stream, each behind a modulated norm and a gate (adaLN-Zero).

    The published block in plain PyTorch, op by op: what `AdaLNZeroBlock` computes in single passes, whose arguments
    these are. It is that of SiT and DiT; that of LightningDiT with norm="rms", qk_norm=True, mlp="swiglu".
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        norm: str = "layer",
        qk_norm: bool = False,
        mlp: str = "gelu",
        cross: bool = False,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.recompute = recompute
        inner = int(hidden_size * mlp_ratio)
        self.norm1 = _norm(norm, hidden_size)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.cross_attn = CrossAttention(hidden_size, num_heads) if cross else None
        self.norm2 = _norm(norm, hidden_size)
        self.mlp = Mlp(hidden_size, inner) if mlp == "gelu" else GatedMlp(hidden_size, int(2 / 3 * inner))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        text: Tensor | None = None,
        text_lengths: Tensor | None = None,
    ) -> Tensor:
        """Tokens x (N, T, D) and condition c (N, D) → (N, T, D), as `AdaLNZeroBlock`."""
        words = None if text is None else (text, text_lengths)
        return recomputed(self.recompute, self._forward, x, c, rope, lengths, words)

    def _forward(
        self,
        x: Tensor,
        c: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        lengths: Tensor | None,
        words: tuple[Tensor, Tensor | None] | None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), rope, lengths)
        if self.cross_attn is not None:
            assert words is not None, "a block with cross=True needs text"
            x = x + self.cross_attn(x, words[0], lengths=lengths, text_lengths=words[1])
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


def _norm(norm: str, width: int) -> nn.Module:
    return RmsNorm(width) if norm == "rms" else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
