"""SRA: a block learns from a later one of the moving average, which sees the same sample with less noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ....errors import ConfigError
from ....losses.representation import RepresentationAlignmentLoss
from ...batch import Batch, Condition
from ...config.loss import AlignConfig
from ...diffusion.interpolants import per_sample
from ...models.embedders import dropped_conditions, keep_dropped
from ...models.sit import SiT
from .base import Drawn, Present, Setting, TaughtTerm, aligned_block, tokens_present


class _Pass(NamedTuple):
    """The samples of a pass, which of their tokens are there, and its number in the step."""

    part: Batch
    present: Present
    number: int


class SraTerm(TaughtTerm):
    """`RepresentationAlignmentLoss` as a term, whose teacher is the moving average of the model.

    The moving average gets the sample and the noise of the pass at a time up to `gap` later (0 is noise, 1 data), and
    the condition as the model saw it, left out where it was left out there. How much later is drawn for each sample
    from the seed, the step and the pass alone: no other random number is moved by it.

    Args:
        loss: its projector is trained with the model.
        block: of the moving average, counted from 1.
        gap: the most that times differ by.
        setting: of the run.

    Source: Jiang et al. 2025, arXiv:2505.02831, and its code.
    """

    name = "sra"

    def __init__(self, loss: RepresentationAlignmentLoss, block: int, gap: float, setting: Setting) -> None:
        super().__init__(loss, "ema", setting)
        self.block, self.gap = block, gap
        keep_dropped(setting.model)

    @classmethod
    def build(cls, setting: Setting) -> SraTerm | None:
        """That of ``config.align``; None for all but "sra".

        Raises:
            ConfigError: blocks that the model does not have, or settings that clash.
        """
        align, depth = setting.config.align, len(setting.model.blocks)
        if align.align != "sra":
            return None
        block = aligned_block(align, depth)
        teacher = align.align_teacher_block
        if teacher is None:
            teacher = max(block, round(depth * 20 / 28))
        elif not block <= teacher <= depth:
            raise ConfigError(
                f"--align-teacher-block {teacher}: block {block} of {depth} learns from it; expected {block} to {depth}"
            )
        loss = build_loss(align, setting.model, block, teacher)
        return cls(loss.to(setting.device), teacher, align.align_gap, setting)

    def targets(self, batch: Batch, passes: int) -> Iterator[_Pass]:
        """The samples, which the teacher sees once their noise is known."""
        present = tokens_present(self._setting, batch, passes)
        for number, (part, there) in enumerate(zip(batch.split(len(batch) // passes), present, strict=True)):
            yield _Pass(part, there, number)

    @torch.no_grad()
    def teach(self, target: _Pass, drawn: Drawn, step: int) -> tuple[Tensor, Present]:
        """The tokens of the moving average, (B / passes, N, D), and which are there."""
        samples, transport, share = target.part.samples, drawn.transport, drawn.share
        with self.clock.measure():
            seed = np.random.SeedSequence((self._setting.config.seed, step, target.number)).generate_state(1)[0]
            generator = torch.Generator(samples.device).manual_seed(int(seed))
            later = torch.rand(len(samples) * share.world, generator=generator, device=samples.device)
            _, last = transport.interval(transport.train_eps)
            times = (drawn.times + self.gap * share.of(later)).clamp(max=last)
            x_t, _ = transport.interpolant.interpolate(per_sample(times, samples), drawn.noise, samples)
            seen = as_seen(self._setting.model, target.part.condition).keywords()
            _, states = self.ema(x_t.to(samples.dtype), times, capture=(self.block,), **seen)
        return states[self.block], target.present

    def loss(self, states: Mapping[Any, Tensor], target: tuple[Tensor, Present], step: int) -> Tensor:
        """The weighted loss."""
        tokens, present = target
        return self.weighted(self.module(states, tokens, step=step, mask=present.mask), present)

    def missing(self, checkpoint: object) -> str:
        """What to do instead."""
        return f"{checkpoint} was trained without SRA; resume it with --align off"


def as_seen(model: SiT, condition: Condition) -> Condition:
    """The condition, null where the model's last forward pass left it out."""
    dropped = dropped_conditions(model)
    if dropped is None:
        return condition
    null = model.without(condition)
    labels = torch.where(dropped, null.labels, condition.labels)
    text_lengths = condition.text_lengths
    if null.text_lengths is not None and condition.text is not None:
        full = torch.full_like(null.text_lengths, condition.text.shape[1])
        text_lengths = torch.where(dropped, null.text_lengths, full if text_lengths is None else text_lengths)
    return dataclasses.replace(condition, labels=labels, text_lengths=text_lengths)


def build_loss(config: AlignConfig, model: SiT, block: int, teacher: int) -> RepresentationAlignmentLoss:
    """The loss that aligns a block of `model` with the block `teacher` of its moving average.

    Raises:
        ConfigError: settings that clash.
    """
    try:
        return RepresentationAlignmentLoss(
            model.hidden_size,
            blocks=[(block, f"ema.{teacher}")],
            method="sra",
            weights=config.align_weight,
            rows=config.align_rows,
            **dataclasses.asdict(config.align_when),
        )
    except ValueError as error:
        raise ConfigError(f"--align sra: {error}") from error
