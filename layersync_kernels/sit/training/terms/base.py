"""What the trainer asks of a term of the loss."""

from __future__ import annotations

import contextlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....losses.layersync import LayerSyncLoss
from ....losses.representation import RepresentationAlignmentLoss
from ....ops.attention import length_mask
from ...batch import Batch
from ...config.run import TrainConfig
from ...data.base import SampleSet
from ...models.sit import Capture, SiT


@dataclass(frozen=True)
class Setting:
    """What a term is built for."""

    config: TrainConfig
    model: SiT
    data: SampleSet
    device: torch.device


class LossTerm(ABC):
    """A term of the loss beside the flow's own. A subclass gives `name` and `loss`, and what else differs from these.

    Attributes:
        name: the loss is recorded as ``NAME_loss``.
        module: what is trained with the model, or None.
        file: stem of the module's file in a checkpoint, and prefix of its parameters in that of the optimiser; None
            where nothing is to be kept.
    """

    name: str
    module: nn.Module | None = None
    file: str | None = None

    def active(self, step: int) -> bool:
        """Whether the term counts in a step; where it does not, only `cause` is called."""
        return True

    def captures(self, kernels: str) -> Sequence[Capture]:
        """What `loss` needs of the model's states, for its `kernels`, "fused" or "eager"."""
        return ()

    def targets(self, batch: Batch, passes: int) -> Iterator[Any]:
        """What `loss` gets for each of the `passes` that the batch is split into, computed when it is asked for."""
        return itertools.repeat(None, passes)

    @abstractmethod
    def loss(self, states: Mapping[Any, Tensor], target: Any, step: int) -> Tensor:
        """The term of one pass, weight included, under autocast.

        Args:
            states: what `captures` asked for, and what other terms did.
            target: what `targets` gave.
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

    def missing(self, checkpoint: object) -> str:
        """What is said when a checkpoint holds nothing of this term."""
        return f"{checkpoint} was trained without the term {self.name}"


TermBuilder = Callable[[Setting], "LossTerm | None"]
"""Makes a term, or None where the config asks for none."""


def tokens_present(model: SiT, batch: Batch) -> Tensor | None:
    """Which tokens of the samples are there: bool (B, N), or None for all."""
    extent, lengths = batch.samples.shape[2:], batch.condition.lengths
    if lengths is None:
        return None
    return length_mask(model.token_lengths(lengths, extent), math.prod(model.grid_of(extent)))


class AlignmentTerm(LossTerm):
    """A term whose module says which blocks it compares, and when."""

    module: LayerSyncLoss | RepresentationAlignmentLoss

    def active(self, step: int) -> bool:
        """What its schedule says."""
        return self.module.active(step)

    def captures(self, kernels: str) -> Sequence[Capture]:
        """Blocks, and pairs where the kernels can fuse them."""
        blocks: Sequence[Any] = self.module.captures if kernels == "fused" else self.module.layers
        return blocks

    def metrics(self) -> Mapping[str, Tensor]:
        """The mean cosine of each pair, as "cosine/STUDENT:TEACHER"."""
        return {f"cosine/{pair}": cosine for pair, cosine in self.module.cosine.items()}
