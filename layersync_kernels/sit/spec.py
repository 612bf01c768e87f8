"""What data, model, sampler, teacher and checkpoints agree on: the shape of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SampleSpec:
    """The shape of a sample, without the batch.

    Attributes:
        channels: C.
        extent: one to three sizes: (length,), (height, width) or (frames, height, width).
        variable: whether the first size is a maximum, and samples have lengths of their own up to it.

    Raises:
        ValueError: other than one to three sizes, or one below 1.
    """

    channels: int
    extent: tuple[int, ...]
    variable: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.extent) <= 3 or min(self.channels, *self.extent) < 1:
            raise ValueError(f"a sample has channels and one to three extents, all positive; got {self.shape}")

    @classmethod
    def of(cls, shape: Sequence[int], *, variable: bool = False) -> SampleSpec:
        """That of (C, ...)."""
        channels, *extent = (int(size) for size in shape)
        return cls(channels, tuple(extent), variable)

    def __str__(self) -> str:
        return f"{self.shape}, shorter ones included" if self.variable else str(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, ...)."""
        return self.channels, *self.extent
