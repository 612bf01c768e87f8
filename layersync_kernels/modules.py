"""Pieces of a denoiser's block that run on the fused ops, with the parameter names of the published models."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import (
    Seam,
    Tap,
    aligned_residual_norm,
    gated_residual,
    gelu_mlp,
    modulated_layer_norm,
    modulated_rms_norm,
    self_attention,
)
from .recompute import check_mode, recomputed

__all__ = ["AdaLNZeroBlock", "Attention", "BlockOutput", "GeluMlp", "ModulatedNorm", "Stream", "SwiGluMlp", "rope_2d"]


class Stream(NamedTuple):
    """A residual stream whose last update is still to be added, in the pass that also norms it.

    Attributes:
        residual: (B, N, D).
        branch: (B, N, D), what the last half-block returned, or None.
        gate: (B, D), its gate, or None.
    """

    residual: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None


class BlockOutput(NamedTuple):
    """What a block does to a stream.

    Attributes:
        stream: with this block's MLP branch still to be added.
        hidden: (B, N, D), the stream at the block's entrance, which is the output of the block before.
        cosine: (B, N) fp32, of the student with `hidden`, or None.
        tap: of `hidden`, or None.
    """

    stream: Stream
    hidden: Tensor
    cosine: Tensor | None
    tap: Tap | None


class ModulatedNorm(nn.Module):
    """LayerNorm without weights, or RMSNorm with one, ahead of adaLN's shift and scale.

    Args:
        width: D.
        norm: "layer" or "rms".
        eps: added to the variance or the mean square.

    Raises:
        ValueError: another norm.
    """

    def __init__(self, width: int, norm: str = "layer", eps: float = 1e-6) -> None:
        super().__init__()
        if norm not in ("layer", "rms"):
            raise ValueError(f"ModulatedNorm: unknown norm={norm!r}; expected 'layer' or 'rms'")
        self.norm, self.eps = norm, eps
        self.weight = nn.Parameter(torch.ones(width)) if norm == "rms" else None

    def fold(self, scale: Tensor) -> Tensor:
        """The scale with the weight in it: w·(1 + scale) - 1, one value per sample and channel."""
        return scale if self.weight is None else self.weight * (1 + scale) - 1

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Tokens x (B, N, D), shift and scale (B, D) → (B, N, D)."""
        run = modulated_layer_norm if self.norm == "layer" else modulated_rms_norm
        return run(x, shift, self.fold(scale), eps=self.eps)

    def enter(self, stream: Stream, shift: Tensor, scale: Tensor, student: Tap | None, tap: bool) -> Seam:
        """Add the stream's pending update and norm the sum: the residual, its norm, cosine and tap."""
        if stream.branch is None:
            return Seam(stream.residual, self(stream.residual, shift, scale), None, None)
        assert stream.gate is not None
        return aligned_residual_norm(
            stream.residual,
            stream.branch,
            stream.gate,
            shift,
            self.fold(scale),
            student=student,
            tap=tap,
            eps=self.eps,
            norm=self.norm,
        )


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
            q, k = _rotate(q, *rope).to(v.dtype), _rotate(k, *rope).to(v.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class HeadNorm(nn.Module):
    """RMSNorm over the channels of a head, with a weight."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, heads, E) → the same."""
        return modulated_rms_norm(x, None, self.weight - 1, eps=self.eps)


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


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


class GeluMlp(nn.Module):
    """Linear, tanh-GELU, linear; the activation is not kept for the backward pass."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) → (B, N, D)."""
        if type(self.fc1) is not nn.Linear or type(self.fc2) is not nn.Linear:
            # LoRA, quantised or sharded layers in their place: there is more to them than a weight and a bias.
            return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class SwiGluMlp(nn.Module):
    """silu(x·A)·(x·B) through a linear layer, A and B being one; torch.compile fuses the product."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * inner_size)
        self.w3 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) → (B, N, D)."""
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class AdaLNZeroBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning: that of DiT and SiT, or of LightningDiT, on the fused ops.

    Parameter names, initialisation order and results are those of the published blocks. Given tokens it returns tokens.
    Given a `Stream` it leaves its last update pending, so that the next block adds it in the pass that norms the sum:
    then a block moves two gated_residual_norms' worth of memory, and the alignment of two blocks rides along.

    Args:
        hidden_size: D.
        num_heads: heads, which divide D.
        mlp_ratio: inner width of the MLP over D.
        norm: "layer", or "rms" with a weight.
        qk_norm: RMSNorm of queries and keys.
        mlp: "gelu", or "swiglu" (two thirds of the inner width, as LightningDiT has it).
        recompute: what the backward pass computes again, see `recompute.recomputed`.

    Raises:
        ValueError: an unknown norm, mlp or recompute, heads that do not divide D.
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
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.recompute = check_mode(recompute)
        if mlp not in ("gelu", "swiglu"):
            raise ValueError(f"AdaLNZeroBlock: unknown mlp={mlp!r}; expected 'gelu' or 'swiglu'")
        inner = int(hidden_size * mlp_ratio)
        self.norm1 = ModulatedNorm(hidden_size, norm)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.norm2 = ModulatedNorm(hidden_size, norm)
        self.mlp = GeluMlp(hidden_size, inner) if mlp == "gelu" else SwiGluMlp(hidden_size, int(2 / 3 * inner))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self,
        x: Tensor | Stream,
        c: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        *,
        student: Tap | None = None,
        tap: bool = False,
    ) -> Tensor | BlockOutput:
        """Run the block.

        Args:
            x: tokens (B, N, D), or a stream.
            c: condition (B, D).
            rope: cosines and sines of rotary positions, see `Attention`.
            student: tap of a shallower hidden state, to be aligned with this block's entrance (streams only).
            tap: whether this block's entrance is a student itself (streams only).

        Returns:
            tokens for tokens, a `BlockOutput` for a stream.
        """
        return recomputed(self.recompute, self._forward, x, c, rope, student, tap)

    def _forward(
        self, x: Tensor | Stream, c: Tensor, rope: tuple[Tensor, Tensor] | None, student: Tap | None, tap: bool
    ) -> Tensor | BlockOutput:
        stream = x if isinstance(x, Stream) else Stream(x)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        hidden, normed, cosine, own_tap = self.norm1.enter(stream, shift1, scale1, student, tap)
        after_attention = Stream(hidden, self.attn(normed, rope), gate1)
        residual, normed, _, _ = self.norm2.enter(after_attention, shift2, scale2, None, False)
        branch = self.mlp(normed)
        if not isinstance(x, Stream):
            return gated_residual(residual, branch, gate2)
        return BlockOutput(Stream(residual, branch, gate2), hidden, cosine, own_tap)
