"""What a data set gives, and what a model is told about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..ops.attention import length_mask

P = TypeVar("P", bound="_Parts")


@dataclass(frozen=True)
class _Parts:
    """Tensors of one batch, and dataclasses of such; None where there is nothing."""

    def _map(self: P, function: Any) -> P:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self)(**{name: None if value is None else function(value) for name, value in values.items()})

    def to(self: P, device: torch.device, *, non_blocking: bool = False) -> P:
        """The same on a device."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def __getitem__(self: P, index: slice | Tensor) -> P:
        """Some of the samples."""
        return self._map(lambda value: value[index])

    def split(self: P, size: int) -> list[P]:
        """In pieces of that many samples; the last may have fewer."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def __len__(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class Condition(_Parts):
    """What the model is told of each sample beside the sample itself.

    Attributes:
        labels: int64 (B,); zeros where there are no classes.
        lengths: int64 (B,), how much of the first extent is there, at least 1; None: all of it.
        text: float32 (B, L, E), embeddings of the words that describe a sample; None: there are none.
        text_lengths: int64 (B,), how many of the L; None: all.
    """

    labels: Tensor
    lengths: Tensor | None = None
    text: Tensor | None = None
    text_lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def keywords(self) -> dict[str, Tensor]:
        """As keywords of the model."""
        values = {"y": self.labels, "lengths": self.lengths, "text": self.text, "text_lengths": self.text_lengths}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def cat(cls, parts: Sequence[Condition]) -> Condition:
        """One after the other; all have the same attributes."""

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        return cls(**{f.name: joined(f.name) for f in dataclasses.fields(cls)})


@dataclass(frozen=True)
class Batch(_Parts):
    """Samples of one shape.

    Attributes:
        samples: float32 (B, C, ...); zeros beyond a sample's length.
        condition: what is known of them.
        index: int64 (B,) on the CPU, their numbers in the data set.
        mirrored: bool (B, 1, ...), those that have been mirrored; None where none ever is.
    """

    samples: Tensor
    condition: Condition
    index: Tensor
    mirrored: Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """The same on a device, but for the index, which only the host reads."""
        condition = self.condition.to(device, non_blocking=non_blocking)
        mirrored = None if self.mirrored is None else self.mirrored.to(device, non_blocking=non_blocking)
        return Batch(self.samples.to(device, non_blocking=non_blocking), condition, self.index, mirrored)

    @property
    def labels(self) -> Tensor:
        """Int64 (B,)."""
        return self.condition.labels


@dataclass(frozen=True)
class Share:
    """Which samples of a batch a process has: of each of the passes that a batch is split into, its own part.

    A pass of all processes is then the same samples as the pass of a single one, whatever their number.

    Attributes:
        rank: which process, of `world`.
        world: how many processes there are.
        passes: how many a batch is split into, one after the other.
    """

    rank: int = 0
    world: int = 1
    passes: int = 1

    @property
    def of_a_pass(self) -> Share:
        """That of a batch which is a single pass."""
        return dataclasses.replace(self, passes=1)

    def of(self, rows: Tensor) -> Tensor:
        """Of something (B, ...) that there is of each sample of a batch: (B / world, ...); B divides into all parts.

        Raises:
            ValueError: it does not.
        """
        if self.world == 1:
            return rows
        if len(rows) % (self.passes * self.world):
            raise ValueError(
                f"a batch of {len(rows)} does not divide into {self.passes} passes of {self.world} processes; "
                f"expected a multiple of {self.passes * self.world}"
            )
        return rows.unflatten(0, (self.passes, self.world, -1))[:, self.rank].flatten(0, 1)


WHOLE = Share()
"""All of a batch."""


def within_lengths(lengths: Tensor, samples: Tensor) -> Tensor:
    """What is there of samples (B, C, L, ...) of lengths (B,): bool (B, 1, L, 1, ...)."""
    size = samples.shape[2]
    return length_mask(lengths, size).view(samples.shape[0], 1, size, *[1] * (samples.ndim - 3))
