"""Images of several sizes in one run: each goes to the size whose proportions are nearest to its own."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..batch import WHOLE, Batch, Share
from .base import EpochShuffle, SampleSet, seeded
from .memory import MemorySet


@dataclass(kw_only=True)
class BucketedSet(SampleSet):
    """Sets of different sizes. A batch is of one of them; all get their share of an epoch.

    In an epoch each size gives as many whole batches as it has, in an order that follows from the seed and the epoch.
    What is left of a size is left out for that epoch; another part of it is the next time.

    Attributes:
        parts: the sets; numbers of samples run from the first to the last.
    """

    parts: list[MemorySet] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def take(self, index: Tensor) -> Batch:
        """See `SampleSet.take`; samples of one size.

        Raises:
            ValueError: they are of several sizes.
        """
        ends = list(itertools.accumulate(map(len, self.parts)))
        owners = {bisect.bisect_right(ends, i) for i in index.tolist()}
        if len(owners) != 1:
            raise ValueError("take: the samples are of several sizes; ask for those of one")
        (owner,) = owners
        batch = self.parts[owner].take(index - (ends[owner] - len(self.parts[owner])))
        return Batch(batch.samples, batch.condition, index)

    def batches(self, batch_size: int, *, seed: int, start: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """See `SampleSet.batches`. The stream of a size is cut into batches; `start` is rounded down to a whole batch.

        Raises:
            DataError: no size has a whole batch.
        """
        counts = [len(part) // batch_size for part in self.parts]
        per_epoch = sum(counts)
        if per_epoch == 0:
            sizes = ", ".join(f"{len(part)} of {part.spec.extent}" for part in self.parts)
            raise DataError(f"no size has enough samples for a batch of {batch_size}: {sizes}; lower --batch-size")
        shuffles = [EpochShuffle(len(part), seed + 1 + number) for number, part in enumerate(self.parts)]
        firsts = [0, *itertools.accumulate(map(len, self.parts))]
        for number in itertools.count(start // batch_size):
            epoch, position = divmod(number, per_epoch)
            owner, turn = self._turn(counts, seed, epoch, position)
            numbers = shuffles[owner].indices((epoch * counts[owner] + turn) * batch_size, batch_size)
            yield self.take(share.of(numbers + firsts[owner]))

    @staticmethod
    def _turn(counts: Sequence[int], seed: int, epoch: int, position: int) -> tuple[int, int]:
        """The size of a batch of an epoch, and which of that size's batches it is."""
        owners = np.repeat(np.arange(len(counts)), counts)
        order = torch.randperm(len(owners), generator=seeded(seed, epoch, len(counts))).numpy()
        shuffled = owners[order]
        owner = int(shuffled[position])
        return owner, int((shuffled[:position] == owner).sum())


def nearest_bucket(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> int:
    """The number of the size whose proportions are nearest to those of an image."""
    ratio = math.log(height / width)
    return min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i][0] / sizes[i][1]) - ratio))
