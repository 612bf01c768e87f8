"""The teacher's share of a step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import torch


class TeacherClock:
    """The teacher's share of a step, measured in some steps only: in those the host waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._teacher = self._steps = 0.0
        self._measuring = False

    @property
    def share(self) -> float:
        """Of all measured steps; NaN before the first."""
        return self._teacher / self._steps if self._steps else math.nan

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Measures the step inside."""
        began, self._measuring = self._now(), True
        yield
        self._steps, self._measuring = self._steps + self._now() - began, False

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Counts what is inside as the teacher's, if the step is measured."""
        if not self._measuring:
            yield
            return
        began = self._now()
        yield
        self._teacher += self._now() - began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
