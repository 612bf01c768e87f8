"""The block of DiT, SiT and LightningDiT."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..compiler.recompute import check_mode, recomputed
from ..functional.seam import Tap, gated_residual
from .attention import Attention, CrossAttention
from .linear import lent_bias
from .mlp import GeluMlp, SwiGluMlp
from .norm import ModulatedNorm, Stream


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
        cross: attention to the words of a text between self-attention and MLP, as PixArt has it.
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
        cross: bool = False,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.recompute = check_mode(recompute)
        if mlp not in ("gelu", "swiglu"):
            raise ValueError(f"AdaLNZeroBlock: unknown mlp={mlp!r}; expected 'gelu' or 'swiglu'")
        inner = int(hidden_size * mlp_ratio)
        self.norm1 = ModulatedNorm(hidden_size, norm)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.cross_attn = CrossAttention(hidden_size, num_heads) if cross else None
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
        lend_bias: bool = False,
        lengths: Tensor | None = None,
        text: Tensor | None = None,
        text_lengths: Tensor | None = None,
    ) -> Tensor | BlockOutput:
        """Run the block.

        Args:
            x: tokens (B, N, D), or a stream.
            c: condition (B, D).
            rope: cosines and sines of rotary positions, see `Attention`.
            student: tap of a shallower hidden state, to be aligned with this block's entrance (streams only).
            tap: whether this block's entrance is a student itself (streams only).
            lend_bias: whether the stream that is returned lends the bias of its last layer (streams only): the pass
                that adds the update then sums its gradient too. A block or `Stream.finished` must take the stream; who
                adds the update by hand leaves that bias without a gradient.
            lengths: int64 (B,), tokens of each sample that are there: attention is among those. None: all.
            text: (B, L, D), words for a block with `cross`.
            text_lengths: int64 (B,), words that are there; None: all.

        Returns:
            tokens for tokens, a `BlockOutput` for a stream.
        """
        words = None if text is None else (text, text_lengths)
        return recomputed(self.recompute, self._forward, x, c, rope, student, tap, lend_bias, lengths, words)

    def _forward(
        self,
        x: Tensor | Stream,
        c: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        student: Tap | None,
        tap: bool,
        lend_bias: bool,
        lengths: Tensor | None,
        words: tuple[Tensor, Tensor | None] | None,
    ) -> Tensor | BlockOutput:
        stream = x if isinstance(x, Stream) else Stream(x)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        hidden, normed, cosine, own_tap = self.norm1.enter(stream, shift1, scale1, student, tap)
        bias = lent_bias(self.attn.proj)
        branch = self.attn(normed, rope, lengths=lengths, lend_bias=bias is not None)
        if self.cross_attn is not None:
            assert words is not None, "a block with cross=True needs text"
            attended = gated_residual(hidden, branch, gate1, bias=bias)
            branch = self.cross_attn(attended, words[0], lengths=lengths, text_lengths=words[1])
            after_attention = Stream(attended, branch, torch.ones_like(gate1))
        else:
            after_attention = Stream(hidden, branch, gate1, bias)
        residual, normed, _, _ = self.norm2.enter(after_attention, shift2, scale2, None, False)
        is_stream = isinstance(x, Stream)
        bias = lent_bias(self.mlp.last) if lend_bias or not is_stream else None
        after_mlp = Stream(residual, self.mlp(normed, lend_bias=bias is not None), gate2, bias)
        return BlockOutput(after_mlp, hidden, cosine, own_tap) if is_stream else after_mlp.finished()
