"""When an alignment loss is on, and how much it weighs."""

from __future__ import annotations

import math
from dataclasses import dataclass

_KINDS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A factor of the trainer's step.

    Attributes:
        kind: "constant"; or "linear" or "cosine" from 1 at `start_step` to 0 at `stop_step`.
        start_step: where the decay begins (not for "constant").
        stop_step: from this step on the factor is 0. "constant" runs forever without it; the others need it.
        every: the factor is 0 but for each n-th step (those divisible by n), and not larger in those.

    Raises:
        ValueError: an unknown kind, an incomplete decay, `every` below 1.
    """

    kind: str = "constant"
    start_step: int = 0
    stop_step: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"unknown schedule {self.kind!r}; expected one of {_KINDS}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if self.kind == "constant":
            if self.start_step != 0:
                raise ValueError("start_step is where a decay begins; a constant schedule has none")
        elif self.stop_step is None or self.stop_step <= self.start_step:
            raise ValueError(
                f"schedule {self.kind!r} needs stop_step > start_step, "
                f"got start_step={self.start_step}, stop_step={self.stop_step}"
            )

    @property
    def needs_step(self) -> bool:
        """Whether the factor depends on the step."""
        return self.stop_step is not None or self.every > 1

    def factor(self, step: int) -> float:
        """The factor at a step, in [0, 1]."""
        if step % self.every or (self.stop_step is not None and step >= self.stop_step):
            return 0.0
        if self.kind == "constant" or step <= self.start_step:
            return 1.0
        assert self.stop_step is not None
        progress = (step - self.start_step) / (self.stop_step - self.start_step)
        return 1 - progress if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    def active(self, step: int) -> bool:
        """Whether the factor at a step is above 0."""
        return self.factor(step) > 0
