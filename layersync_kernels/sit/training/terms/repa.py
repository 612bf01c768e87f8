"""REPA: a block learns from the tokens of a pretrained network that sees the clean sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ....errors import ConfigError, DataError, TeacherError
from ....losses.representation import RepresentationAlignmentLoss
from ...batch import Batch
from ...config.loss import AlignConfig
from ...models.sit import SiT
from ...teachers.base import Teacher, not_finite
from ...teachers.features import Features, latent_message
from ...teachers.grids import GridTeacher, load_any
from .base import Present, Setting, TaughtTerm, aligned_block, tokens_present


class RepaTerm(TaughtTerm):
    """`RepresentationAlignmentLoss` as a term, with its teacher.

    Args:
        loss: its projectors are trained with the model.
        teacher: the network, or its precomputed features.
        setting: whose model's tokens learn, and on which device.
    """

    name = "repa"

    def __init__(
        self,
        loss: RepresentationAlignmentLoss,
        teacher: Teacher | GridTeacher | Features,
        setting: Setting,
    ) -> None:
        super().__init__(loss, teacher.name, setting)
        self.teacher = teacher
        self._sums: list[Tensor] = []  # of the tokens of each pass since the last check, still on the device

    @classmethod
    def build(cls, setting: Setting) -> RepaTerm | None:
        """That of ``config.align``; None for "off" and "sra".

        Raises:
            DataError: latents, of which there are no precomputed features.
            ConfigError, TeacherError: as `build_loss`, `load_any` and `Features`.
        """
        config, data, device = setting.config, setting.data, setting.device
        align = config.align
        if align.align in ("off", "sra"):
            return None
        teacher: Teacher | GridTeacher | Features
        if align.features is not None:
            teacher = Features(align.features, data, teacher=align.teacher, flip=config.data.flip)
            width = teacher.width
        elif data.latent:
            raise DataError(latent_message(config.data.data))
        else:
            assert align.teacher is not None  # `validate` has seen to that
            teacher = load_any(
                align.teacher,
                data.modality,
                setting.model.grid,
                size=align.teacher_size,
                weights=align.teacher_weights,
            )
            teacher.to(device)
            first = data.take(torch.arange(min(2, len(data)))).to(device)
            width = teacher.width(first.samples, first.condition.lengths)
        return cls(build_loss(align, setting.model, teacher.name, width).to(device), teacher, setting)

    def targets(self, batch: Batch, passes: int) -> Iterator[tuple[Tensor, Present]]:
        """The teacher's tokens (B / passes, N, T), and which are there."""
        present = tokens_present(self._setting, batch, passes)
        if isinstance(self.teacher, Features):
            with self.clock.measure():
                tokens = self.teacher.tokens(batch.index, batch.mirrored).to(self._setting.device, non_blocking=True)
            yield from zip(tokens.chunk(passes), present, strict=True)
        else:
            for part, there in zip(batch.split(len(batch) // passes), present, strict=True):
                with self.clock.measure():
                    tokens = self.teacher(part.samples, part.condition.lengths)
                yield tokens, there

    def loss(self, states: Mapping[Any, Tensor], target: tuple[Tensor, Present], step: int) -> Tensor:
        """The weighted loss.

        Raises:
            TeacherError: the teacher's tokens do not fit the model's.
        """
        tokens, present = target
        self._sums.append(tokens.float().sum())
        try:
            return self.weighted(self.module(states, tokens, step=step, mask=present.mask), present)
        except ValueError as error:  # token counts that cannot be interpolated; NaN in the very first call
            raise TeacherError(f"the teacher {self.module.pairs[0][1]} does not fit: {error}") from error

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
    block, width = aligned_block(config, len(model.blocks)), model.hidden_size
    try:
        return RepresentationAlignmentLoss(
            width,
            teacher_size,
            [(block, teacher)],
            method=config.align,
            projector_dim=min(2048, 4 * width) if config.projector_dim is None else config.projector_dim,
            weights=config.align_weight,
            rows=config.align_rows,
            interpolate=True,
            **dataclasses.asdict(config.align_when),
        )
    except ValueError as error:
        raise ConfigError(f"--align {config.align}: {error}") from error
