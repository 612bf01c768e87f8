"""What the trainer asks of a term of the loss."""

from __future__ import annotations

import contextlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....errors import ConfigError
from ....losses.layersync import LayerSyncLoss
from ....losses.representation import RepresentationAlignmentLoss
from ....ops.attention import length_mask
from ...batch import WHOLE, Batch, Share
from ...config.loss import AlignConfig
from ...config.run import TrainConfig
from ...data.base import SampleSet
from ...diffusion.transport import Transport
from ...distributed.processes import ALONE, Processes
from ...models.sit import Capture, SiT
from ...teachers.clock import TeacherClock


@dataclass(frozen=True)
class Setting:
    """What a term is built for."""

    config: TrainConfig
    model: SiT
    data: SampleSet
    device: torch.device
    processes: Processes = ALONE


@dataclass(frozen=True)
class Drawn:
    """What a pass was drawn at.

    Attributes:
        times: (B / passes,).
        noise: like the samples.
        transport: what lies between noise and samples.
        share: this process's, of the pass.
    """

    times: Tensor
    noise: Tensor
    transport: Transport
    share: Share = WHOLE


class LossTerm(ABC):
    """A term of the loss beside the flow's own. A subclass gives `name` and `loss`, and what else differs from these.

    Attributes:
        name: the loss is recorded as ``NAME_loss``.
        module: what is trained with the model, or None.
        file: stem of the module's file in a checkpoint, and prefix of its parameters in that of the optimiser; None
            where nothing is to be kept.
        ema: the moving average of the model, the first one, which is there before training begins.
    """

    name: str
    module: nn.Module | None = None
    file: str | None = None
    ema: SiT

    def active(self, step: int) -> bool:
        """Whether the term counts in a step; where it does not, only `cause` is called."""
        return True

    def captures(self, kernels: str) -> Sequence[Capture]:
        """What `loss` needs of the model's states, for its `kernels`, "fused" or "eager"."""
        return ()

    def targets(self, batch: Batch, passes: int) -> Iterator[Any]:
        """What `loss` gets for each of the `passes` that the batch is split into, computed when it is asked for."""
        return itertools.repeat(None, passes)

    def teach(self, target: Any, drawn: Drawn, step: int) -> Any:
        """What `loss` gets in the place of a target, where that depends on what a pass was drawn at; under autocast."""
        return target

    @abstractmethod
    def loss(self, states: Mapping[Any, Tensor], target: Any, step: int) -> Tensor:
        """The term of one pass, weight included, under autocast.

        Args:
            states: what `captures` asked for, and what other terms did.
            target: what `targets` gave, and `teach` made of it.
            step: optimiser steps done.

        Returns:
            a 0-d tensor.
        """

    def metrics(self) -> Mapping[str, Tensor]:
        """What else there is to record of the last `loss`: detached 0-d tensors."""
        return {}

    def measured(self) -> AbstractContextManager[None]:
        """Around a step whose end is recorded: a term may wait for the device in it."""
        return contextlib.nullcontext()

    def facts(self) -> Mapping[str, float]:
        """What there is to record of the measured steps."""
        return {}

    def cause(self, diverged: bool) -> str | None:
        """Called at every check, for what was kept for it: why a loss since the last one was not finite, if known.

        Args:
            diverged: whether one was not; False: nothing is to be read from the device.
        """
        return None

    def summary(self) -> str:
        """What is said of it when a run starts; empty: nothing."""
        return ""

    def missing(self, checkpoint: object) -> str:
        """What is said when a checkpoint holds nothing of this term."""
        return f"{checkpoint} was trained without the term {self.name}"


TermBuilder = Callable[[Setting], "LossTerm | None"]
"""Makes a term, or None where the config asks for none."""


class Present(NamedTuple):
    """The tokens of a pass that are there.

    Attributes:
        mask: bool (B / passes, N); None: all are.
        weight: how many, over how many there are on average in the passes of all processes: a 0-d tensor. The mean of
            means, weighted so, is the mean over all tokens of the step. None: 1.
    """

    mask: Tensor | None = None
    weight: Tensor | None = None


def tokens_present(setting: Setting, batch: Batch, passes: int) -> list[Present]:
    """Which tokens of a batch are there, pass by pass."""
    extent, lengths = batch.samples.shape[2:], batch.condition.lengths
    if lengths is None:
        return [Present()] * passes
    there = setting.model.token_lengths(lengths, extent)
    counts = there.view(passes, -1).sum(1)
    every = setting.processes.mean(counts.float().mean())
    masks = length_mask(there, math.prod(setting.model.grid_of(extent))).chunk(passes)
    return [Present(mask, weight) for mask, weight in zip(masks, counts / every, strict=True)]


class AlignmentTerm(LossTerm):
    """A term whose module says which blocks it compares, and when."""

    module: LayerSyncLoss | RepresentationAlignmentLoss
    _weight: Tensor | None = None

    def active(self, step: int) -> bool:
        """What its schedule says."""
        return self.module.active(step)

    def captures(self, kernels: str) -> Sequence[Capture]:
        """Blocks, and pairs where the kernels can fuse them."""
        blocks: Sequence[Any] = self.module.captures if kernels == "fused" else self.module.layers
        return blocks

    def weighted(self, loss: Tensor, present: Present) -> Tensor:
        """The mean over the tokens of a pass, as its part of that over all tokens of the step."""
        self._weight = present.weight
        return loss if present.weight is None else loss * present.weight

    def metrics(self) -> Mapping[str, Tensor]:
        """The mean cosine of each pair, as "cosine/STUDENT:TEACHER"."""
        weight = 1 if self._weight is None else self._weight
        return {f"cosine/{pair}": cosine * weight for pair, cosine in self.module.cosine.items()}


class TaughtTerm(AlignmentTerm):
    """One whose teacher is a forward pass of its own, with projectors that are trained with the model.

    Args:
        loss: the loss, whose projectors those are.
        teacher_name: for messages.
        setting: whose model's tokens learn, and on which device.

    Attributes:
        clock: measures the teacher's share of the measured steps.
    """

    file = "projector"
    module: RepresentationAlignmentLoss

    def __init__(self, loss: RepresentationAlignmentLoss, teacher_name: str, setting: Setting) -> None:
        self.module, self.teacher_name, self._setting = loss, teacher_name, setting
        self.clock = TeacherClock(setting.device)

    def measured(self) -> AbstractContextManager[None]:
        """The clock's step."""
        return self.clock.step()

    def facts(self) -> Mapping[str, float]:
        """The teacher's share, once a step has been measured."""
        return {} if math.isnan(self.clock.share) else {"teacher_share": self.clock.share}

    def summary(self) -> str:
        """Its method, block, teacher and schedule."""
        return f"{self.module.method} {self.module.extra_repr()}"


def aligned_block(config: AlignConfig, depth: int) -> int:
    """The block that learns, of a model of that depth.

    Raises:
        ConfigError: the model has none of that number.
    """
    block = max(1, round(depth * 8 / 28)) if config.align_block is None else config.align_block
    if not 1 <= block <= depth:
        raise ConfigError(f"--align-block {block}: the model has blocks 1 to {depth}")
    return block
