"""Dispersive loss: the samples of a batch drive each other apart in a block."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import ConfigError
from ....functional.dispersive import dispersive_loss
from ....losses.schedule import Schedule
from ....ops.attention import length_mask
from ...batch import Batch
from .base import LossTerm, Setting


class DispersiveTerm(LossTerm):
    """`dispersive_loss` of the output of a block, over the samples of a pass in all processes.

    A sample is what the paper disperses, all of its tokens flattened. Where samples have lengths it is the mean of the
    tokens that are there: flattened, a token would be compared with one that the other sample does not have.

    Args:
        block: counted from 1.
        weight: of the loss.
        temperature: τ.
        schedule: when it counts.
        setting: whose model's samples disperse.

    Source: Wang and He 2025, Diffuse and Disperse, arXiv:2506.09027.
    """

    name = "dispersive"

    def __init__(self, block: int, weight: float, temperature: float, schedule: Schedule, setting: Setting) -> None:
        self.block, self.weight, self.temperature, self.schedule = block, weight, temperature, schedule
        self._model, self._gather = setting.model, setting.processes.world > 1

    @classmethod
    def build(cls, setting: Setting) -> DispersiveTerm | None:
        """That of ``config.dispersive``; None for "off".

        Raises:
            ConfigError: a block that the model does not have, an incomplete schedule.
        """
        config, depth = setting.config.dispersive, len(setting.model.blocks)
        if config.dispersive == "off":
            return None
        block = max(1, depth // 4) if config.dispersive == "auto" else config.dispersive
        if not 1 <= block <= depth:
            raise ConfigError(f"--dispersive {block}: the model has blocks 1 to {depth}")
        when = dataclasses.asdict(config.dispersive_when)
        try:
            schedule = Schedule(when.pop("schedule"), **when)
        except ValueError as error:
            raise ConfigError(f"--dispersive {config.dispersive}: {error}") from error
        return cls(block, config.dispersive_weight, config.dispersive_temperature, schedule, setting)

    def active(self, step: int) -> bool:
        """What its schedule says."""
        return self.schedule.active(step)

    def captures(self, kernels: str) -> Sequence[int]:
        """The block."""
        return (self.block,)

    def targets(self, batch: Batch, passes: int) -> Iterator[Tensor | None]:
        """How many tokens of each sample are there, (B / passes,); None: all."""
        lengths = batch.condition.lengths
        if lengths is None:
            return super().targets(batch, passes)
        return iter(self._model.token_lengths(lengths, batch.samples.shape[2:]).chunk(passes))

    def loss(self, states: Mapping[Any, Tensor], target: Tensor | None, step: int) -> Tensor:
        """The weighted loss of the pass, the same in all processes."""
        samples = states[self.block]
        if target is not None:
            there = length_mask(target, samples.shape[1])[..., None]
            samples = torch.where(there, samples, 0).sum(1, dtype=torch.float32) / target[:, None]
        loss = dispersive_loss(samples, temperature=self.temperature, gather="world" if self._gather else None)
        return self.weight * self.schedule.factor(step) * loss

    def summary(self) -> str:
        """Block, weight and temperature."""
        return f"dispersive loss of block {self.block} x {self.weight:g}, temperature {self.temperature:g}"
