"""Optimiser and moving average."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from . import at_least, fraction, positive, require


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and the average of the weights. These defaults are the paper's: the preset of that name."""

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

    @property
    def averages(self) -> dict[str, float]:
        """Their decays by the names of the averages: "ema", and "ema-DECAY" of further ones."""
        first, *others = self.ema_decays
        return {"ema": first, **{f"ema-{decay:g}": decay for decay in others}}

    def start_in_average(self, steps: int, which: str = "ema") -> float:
        """The share of the first weights in the average of that name after so many steps, in [0, 1]."""
        decay = self.averages[which]
        if self.ema_warmup:  # as good as nothing after a few
            return math.prod(min(decay, (1 + step) / (10 + step)) for step in range(min(steps, 100)))
        return decay**steps

    def rate(self, step: int, fraction: float) -> float:
        """The learning rate of the step behind `step` ones, when that fraction of the run is done."""
        rate = self.lr * min(1.0, (step + 1) / max(self.warmup_steps, 1))
        if self.lr_schedule == "linear":
            rate *= 1 - fraction
        elif self.lr_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * fraction))
        return rate

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
