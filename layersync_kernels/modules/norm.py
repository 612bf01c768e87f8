"""The norm of a block's entrance, where a stream's pending update is added."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional.seam import (
    Seam,
    Tap,
    aligned_residual_norm,
    gated_residual,
    gated_residual_norm,
    modulated_layer_norm,
    modulated_rms_norm,
)


class Stream(NamedTuple):
    """A residual stream whose last update is still to be added, in the pass that also norms it.

    Attributes:
        residual: (B, N, D).
        branch: (B, N, D), what the last half-block returned, or None.
        gate: (B, D), its gate, or None.
        bias: (D,), which the branch's last layer has added and lends to the op that adds the update, see
            `linear.lent_bias`; or None.
    """

    residual: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None

    def finished(self) -> Tensor:
        """The stream with its update added, (B, N, D)."""
        if self.branch is None or self.gate is None:
            return self.residual
        return gated_residual(self.residual, self.branch, self.gate, bias=self.bias)


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
            entrance = gated_residual_norm(
                stream.residual, None, None, shift, self.fold(scale), eps=self.eps, norm=self.norm
            )
            return Seam(*entrance, None, None)
        assert stream.gate is not None
        return aligned_residual_norm(
            stream.residual,
            stream.branch,
            stream.gate,
            shift,
            self.fold(scale),
            bias=stream.bias,
            student=student,
            tap=tap,
            eps=self.eps,
            norm=self.norm,
        )
