"""REPA: a block learns from the tokens of a pretrained network that sees the clean image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ....errors import ConfigError, DataError, TeacherError
from ....losses.representation import RepresentationAlignmentLoss
from ...batch import Batch
from ...config.loss import AlignConfig
from ...modality.images import Images
from ...models.sit import SiT
from ...teachers.base import Teacher, not_finite
from ...teachers.clock import TeacherClock
from ...teachers.features import Features, latent_message
from ...teachers.networks import load_teacher
from .base import AlignmentTerm, Setting


class RepaTerm(AlignmentTerm):
    """`RepresentationAlignmentLoss` as a term, with its teacher.

    Args:
        loss: its projectors are trained with the model.
        teacher: the network, or its precomputed features.
        device: where the loss and the network are.

    Attributes:
        clock: measures the teacher's share of the measured steps.
    """

    name = "repa"
    file = "projector"
    module: RepresentationAlignmentLoss

    def __init__(self, loss: RepresentationAlignmentLoss, teacher: Teacher | Features, device: torch.device) -> None:
        self.module, self.teacher, self._device = loss, teacher, device
        self.clock = TeacherClock(device)
        self._sums: list[Tensor] = []  # of the tokens of each pass since the last check, still on the device

    @classmethod
    def build(cls, setting: Setting) -> RepaTerm | None:
        """That of ``config.align``; None for "off".

        Raises:
            DataError: latents, of which there are no precomputed features.
            ConfigError, TeacherError: as `build_loss`, `load_teacher` and `Features`.
        """
        config, data, device = setting.config, setting.data, setting.device
        align = config.align
        if align.align == "off":
            return None
        teacher: Teacher | Features
        if align.features is not None:
            teacher = Features(align.features, data, teacher=align.teacher, flip=config.data.flip)
            width = teacher.width
        elif data.latent:
            raise DataError(latent_message(config.data.data))
        elif not isinstance(data.modality, Images):
            raise DataError(
                f"teachers look at images, and {config.data.data} holds {data.modality.kind}: give features that were "
                "computed elsewhere (--features FILE), or --align off"
            )
        else:
            assert align.teacher is not None  # `validate` has seen to that
            grid = min(setting.model.grid)
            teacher = load_teacher(align.teacher, size=align.teacher_size, grid=grid, weights=align.teacher_weights)
            teacher.to(device)
            width = teacher.width(data.take(torch.arange(min(2, len(data)))).samples.to(device))
        return cls(build_loss(align, setting.model, teacher.name, width).to(device), teacher, device)

    def targets(self, batch: Batch, passes: int) -> Iterator[Tensor]:
        """The teacher's tokens (B / passes, N, T)."""
        if isinstance(self.teacher, Features):
            with self.clock.measure():
                tokens = self.teacher.tokens(batch.index, batch.mirrored).to(self._device, non_blocking=True)
            yield from tokens.chunk(passes)
        else:
            for x in batch.samples.chunk(passes):
                with self.clock.measure():
                    tokens = self.teacher(x)
                yield tokens

    def loss(self, states: Mapping[Any, Tensor], target: Tensor, step: int) -> Tensor:
        """The weighted loss.

        Raises:
            TeacherError: the teacher's tokens do not fit the model's.
        """
        self._sums.append(target.float().sum())
        try:
            return self.module(states, target, step=step)
        except ValueError as error:  # token counts that cannot be interpolated; NaN in the very first call
            raise TeacherError(f"the teacher {self.module.pairs[0][1]} does not fit: {error}") from error

    def measured(self) -> AbstractContextManager[None]:
        """The clock's step."""
        return self.clock.step()

    def facts(self) -> Mapping[str, float]:
        """The teacher's share, once a step has been measured."""
        return {} if math.isnan(self.clock.share) else {"teacher_share": self.clock.share}

    def cause(self, diverged: bool) -> str | None:
        """Tokens that were not finite."""
        sums, self._sums = self._sums, []
        if not diverged or not sums or torch.stack(sums).isfinite().all():
            return None
        return f"{not_finite(self.teacher.name)}; check its weights and features"

    def missing(self, checkpoint: object) -> str:
        """What to do instead."""
        return f"{checkpoint} was trained without a teacher; resume it with --align off"


def build_loss(config: AlignConfig, model: SiT, teacher: str, teacher_size: int) -> RepresentationAlignmentLoss:
    """The loss that aligns a block of `model` with the tokens, `teacher_size` wide, of the teacher of that name.

    Raises:
        ConfigError: a block that the model does not have, or settings that clash.
    """
    depth, width = len(model.blocks), model.hidden_size
    block = max(1, round(depth * 8 / 28)) if config.align_block is None else config.align_block
    if not 1 <= block <= depth:
        raise ConfigError(f"--align-block {block}: the model has blocks 1 to {depth}")
    try:
        return RepresentationAlignmentLoss(
            width,
            teacher_size,
            [(block, teacher)],
            method=config.align,
            projector_dim=min(2048, 4 * width) if config.projector_dim is None else config.projector_dim,
            weights=config.align_weight,
            interpolate=True,
            **dataclasses.asdict(config.align_when),
        )
    except ValueError as error:
        raise ConfigError(f"--align {config.align}: {error}") from error
