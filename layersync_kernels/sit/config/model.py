"""Which model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import fraction


@dataclass(frozen=True)
class ModelConfig:
    """Which SiT."""

    model: str = "SiT-S/2"
    """A published or preset name, such as SiT-XL/2."""
    patch_size: int | tuple[int, ...] | None = None
    """Overrides that of the name: one size for all dimensions of a sample, or one for each."""
    hidden_size: int | None = None
    """Overrides that of the name."""
    depth: int | None = None
    """Overrides that of the name."""
    num_heads: int | None = None
    """Overrides that of the name."""
    num_classes: int | None = None
    """None: as many as the data has."""
    class_dropout: float = 0.1
    """Share of labels replaced by the null label, which classifier-free guidance needs."""
    positions: Literal["sincos", "learnt", "rope"] = "sincos"
    """Of the tokens: fixed and added, learnt and added, or rotary in the attention."""
    condition: Literal["auto", "class", "none", "embedding", "cross"] = "auto"
    """What the model is told: a class; nothing; the words of a text, averaged, or by cross-attention. auto: class, or
    cross where the data has texts."""
    kernels: Literal["fused", "eager"] = "fused"
    """fused: blocks in single passes over memory; eager: the published blocks in plain PyTorch."""
    recompute: Literal["none", "light", "full"] = "none"
    """What the backward pass computes again to save memory: nothing; norms, gates and activations; whole blocks."""
    init: Path | None = None
    """Start from the weights of this checkpoint (a run, a checkpoint folder, a published .pt)."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        fraction(class_dropout=self.class_dropout)
