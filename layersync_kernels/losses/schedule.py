"""When an alignment loss is on, and how much it weighs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .pairs import Block

_SCHEDULES = ("constant", "linear", "cosine")


class AlignmentLoss(nn.Module):
    """What the losses share: weights of their pairs, and when they are on. Arguments as in `LayerSyncLoss`."""

    pairs: tuple[tuple[Block, Block], ...]
    layers: tuple[Block, ...]
    cosine: dict[str, Tensor]

    def __init__(self, *, schedule: str, start_step: int, stop_step: int | None, every: int) -> None:
        super().__init__()
        self.schedule, self.start_step, self.stop_step, self.every = schedule, start_step, stop_step, every
        self.cosine = {}
        name = type(self).__name__
        if schedule not in _SCHEDULES:
            raise ValueError(f"{name}: unknown schedule {schedule!r}; expected one of {_SCHEDULES}")
        if every < 1:
            raise ValueError(f"{name}: every must be at least 1, got {every}")
        if schedule == "constant":
            if start_step != 0:
                raise ValueError(f"{name}: start_step is where a decay begins; a constant schedule has none")
        elif stop_step is None or stop_step <= start_step:
            raise ValueError(
                f"{name}: schedule {schedule!r} needs stop_step > start_step, "
                f"got start_step={start_step}, stop_step={stop_step}"
            )

    def set_weights(self, weights: float | Sequence[float]) -> None:
        """Change λ, of all pairs or of each.

        Raises:
            ValueError: a number of weights other than of pairs.
        """
        if isinstance(weights, int | float):
            weights = (float(weights),) * len(self.pairs)
        self.weights = tuple(map(float, weights))
        if len(self.weights) != len(self.pairs):
            raise ValueError(
                f"{type(self).__name__}: {len(self.weights)} weights for {len(self.pairs)} pairs; give one each"
            )

    @property
    def needs_step(self) -> bool:
        """Whether the schedule depends on the step."""
        return self.stop_step is not None or self.every > 1

    def factor(self, step: int) -> float:
        """The schedule's factor at a step, in [0, 1]; 0 in the steps that `every` skips."""
        if step % self.every or (self.stop_step is not None and step >= self.stop_step):
            return 0.0
        if self.schedule == "constant" or step <= self.start_step:
            return 1.0
        assert self.stop_step is not None
        progress = (step - self.start_step) / (self.stop_step - self.start_step)
        return 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    def active(self, step: int) -> bool:
        """Whether the loss is computed at a step. Where it is not, nothing needs capturing."""
        return self.factor(step) > 0

    def _factor(self, step: int | None) -> float:
        """`factor`, for a step that may be left out where nothing depends on it."""
        if step is None and self.needs_step:
            raise ValueError(f"{type(self).__name__}: this schedule needs to know the step; call it with step=")
        return 1.0 if step is None else self.factor(step)

    def _check_captured(self, missing: tuple[Block, ...], states: Mapping[Any, Any]) -> None:
        if missing:
            raise ValueError(
                f"{type(self).__name__}: blocks {list(missing)} were not captured, only {sorted(states, key=str)}; "
                f"capture {self.layers}"
            )


def zero_loss(states: Mapping[Any, Any]) -> Tensor:
    """A loss that is off, on the device of the states."""
    return torch.zeros((), device=next((s.device for s in states.values() if isinstance(s, Tensor)), None))
