"""How long training waits for its data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class DataClock(Generic[T], Iterator[T]):
    """Hands on what an iterator gives, and counts the seconds that it took.

    Args:
        items: what is waited for.
        now: the time in seconds, of any origin.

    Attributes:
        seconds: spent since the last `lap`.
    """

    def __init__(self, items: Iterable[T], now: Callable[[], float] = time.perf_counter) -> None:
        self._items, self._now = iter(items), now
        self.seconds = 0.0

    def __next__(self) -> T:
        started = self._now()
        try:
            return next(self._items)
        finally:
            self.seconds += self._now() - started

    def lap(self) -> float:
        """The seconds counted so far, from which on it counts anew."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds
