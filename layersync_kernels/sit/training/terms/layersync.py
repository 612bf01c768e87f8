"""LayerSync: a block learns from a deeper one of the same pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ....errors import ConfigError
from ....losses.layersync import LayerSyncLoss
from ....losses.pairs import default_pair
from ...batch import Batch
from ...config.loss import LayerSyncConfig
from .base import AlignmentTerm, Present, Setting, tokens_present


class LayerSyncTerm(AlignmentTerm):
    """`LayerSyncLoss` as a term.

    Args:
        loss: has no parameters.
        setting: whose model's tokens it compares.
    """

    name = "align"
    module: LayerSyncLoss

    def __init__(self, loss: LayerSyncLoss, setting: Setting) -> None:
        self.module, self._setting = loss, setting

    @classmethod
    def build(cls, setting: Setting) -> LayerSyncTerm | None:
        """That of ``config.layersync``; None for "off". Raises as `build_loss`."""
        loss = build_loss(setting.config.layersync, len(setting.model.blocks))
        return None if loss is None else cls(loss, setting)

    def targets(self, batch: Batch, passes: int) -> Iterator[Present]:
        """Which tokens are there."""
        return iter(tokens_present(self._setting, batch, passes))

    def loss(self, states: Mapping[Any, Tensor], target: Present, step: int) -> Tensor:
        """The weighted sum over pairs."""
        return self.weighted(self.module(states, step=step, mask=target.mask), target)

    def summary(self) -> str:
        """Its pairs and schedule."""
        return f"LayerSync {self.module.extra_repr()}"


def build_loss(config: LayerSyncConfig, depth: int) -> LayerSyncLoss | None:
    """The LayerSync loss for a model of `depth` blocks; None for "off".

    Raises:
        ConfigError: a pair that is not STUDENT:TEACHER with 1 <= STUDENT < TEACHER <= depth, or settings that clash.
    """
    wanted = config.layersync
    if wanted == ("off",):
        return None
    pairs = []
    for pair in wanted:
        student, _, teacher = pair.partition(":")
        if wanted == ("auto",):
            try:
                pairs.append(default_pair(depth))
            except ValueError as error:
                raise ConfigError(f"--layersync auto: {error}; use --layersync off") from error
        elif student.isdecimal() and teacher.isdecimal():
            pairs.append((int(student), int(teacher)))
            if int(teacher) > depth:
                raise ConfigError(f"--layersync {pair}: the model has blocks 1 to {depth}")
        else:
            raise ConfigError(f"--layersync {pair}: expected STUDENT:TEACHER such as 8:16, or auto or off alone")
    weights: float | tuple[float, ...] = config.weight[0] if len(config.weight) == 1 else config.weight
    try:
        return LayerSyncLoss(
            pairs,
            weights,
            **dataclasses.asdict(config.when),
            teacher_grad=config.teacher_grad,
            backend=config.loss_backend,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
