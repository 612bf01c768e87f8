"""What the alignment losses share: weighted pairs, and when they count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .pairs import Block, pair_label, sorted_blocks
from .schedule import Schedule


class AlignmentLoss(nn.Module):
    """A weighted sum over pairs of blocks, with a schedule.

    Args:
        pairs: checked ones.
        weights: λ, one for all pairs or one each.
        schedule: the kind of a `Schedule`, whose other attributes follow.
        start_step: where its decay begins.
        stop_step: from this step on the loss is off.
        every: compute the loss in every n-th step only.

    Attributes:
        cosine: the mean cosine of each pair when the loss was last computed, detached 0-d tensors by `pair_label`; NaN
            before.

    Raises:
        ValueError: a number of weights other than of pairs, an incomplete schedule.
    """

    layers: tuple[Block, ...]

    def __init__(
        self,
        pairs: tuple[tuple[Block, Block], ...],
        weights: float | Sequence[float],
        *,
        schedule: str,
        start_step: int,
        stop_step: int | None,
        every: int,
    ) -> None:
        super().__init__()
        try:
            self.schedule = Schedule(schedule, start_step, stop_step, every)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None
        self.pairs = pairs
        self.set_weights(weights)
        self.cosine: dict[str, Tensor] = {pair_label(pair): torch.tensor(math.nan, device="cpu") for pair in pairs}

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
        return self.schedule.needs_step

    def factor(self, step: int | None) -> float:
        """The schedule's factor at a step, in [0, 1]; 0 in the steps that `every` skips.

        Raises:
            ValueError: no step, and a schedule that depends on it.
        """
        if step is not None:
            return self.schedule.factor(step)
        if self.needs_step:
            raise ValueError(f"{type(self).__name__}: this schedule needs to know the step; call it with step=")
        return 1.0

    def active(self, step: int) -> bool:
        """Whether the loss is computed at a step. Where it is not, nothing needs capturing."""
        return self.schedule.active(step)

    def check_captured(self, missing: Sequence[Block], states: Mapping[Any, Any]) -> None:
        """Raises ValueError where blocks are missing among the states."""
        if missing:
            raise ValueError(
                f"{type(self).__name__}: blocks {list(sorted_blocks(missing))} were not captured, only "
                f"{sorted(states, key=str)}; capture {self.layers}"
            )


def zero_loss(states: Mapping[Any, Any]) -> Tensor:
    """A loss that is off, on the device of the states."""
    return torch.zeros((), device=next((s.device for s in states.values() if isinstance(s, Tensor)), None))
