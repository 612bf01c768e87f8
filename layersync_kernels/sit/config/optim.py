"""Optimiser and moving average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import at_least, fraction, positive, require


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and the average of the weights. The defaults are those of the paper."""

    steps: int = 400_000
    """Optimiser steps."""
    max_seconds: float | None = None
    """Also stop after this much training time, resumed time included; the learning rate then decays by time."""
    batch_size: int = 256
    """Samples per optimiser step."""
    accumulate: int = 1
    """Split the batch into this many passes to save memory."""
    lr: float = 1e-4
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to zero at the end of the run."""
    warmup_steps: int = 0
    """The learning rate rises linearly over these steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = None
    """Scale gradients down to this total norm."""
    ema_decay: float | tuple[float, ...] = 0.9999
    """Decay of the averaged weights, which samples are drawn with. Of several, the others are kept as ema-DECAY."""
    ema_warmup: bool = False
    """Average over fewer steps at first: decay = min(ema_decay, (1 + step) / (10 + step))."""

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """All of them."""
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        at_least(1, steps=self.steps, batch_size=self.batch_size, accumulate=self.accumulate)
        at_least(0, warmup_steps=self.warmup_steps, weight_decay=self.weight_decay)
        positive(lr=self.lr, clip_norm=self.clip_norm, max_seconds=self.max_seconds)
        for decay in self.ema_decays:
            fraction(ema_decay=decay)
        require(
            0 < len(self.ema_decays) == len(set(self.ema_decays)),
            f"--ema-decay {' '.join(map(str, self.ema_decays))}: expected one number or several different ones",
        )
        for beta in self.betas:
            fraction(betas=beta)
        require(
            self.batch_size % self.accumulate == 0,
            f"--batch-size {self.batch_size} does not divide into --accumulate {self.accumulate} equal passes",
        )
