"""The block of DiT, SiT and LightningDiT."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..compiler.recompute import check_mode, recomputed
from ..functional.seam import Tap, gated_residual
from .attention import Attention
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
