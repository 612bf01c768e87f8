"""The order of samples that lie in files of many."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Sequence
from typing import BinaryIO

import torch
from torch import Tensor

from .base import Shuffle, seeded

WINDOW = 10_000
"""A window has at least so many samples, where the number of its files is left open."""


def window_of(sizes: Sequence[int], asked: int | None) -> int:
    """How many files are shuffled together: as many as is asked for, else those with `WINDOW` samples, at least two."""
    return asked or max(2, -(-WINDOW * len(sizes) // sum(sizes)))


class ShardShuffle(Shuffle):
    """Epoch after epoch, each file by file in another order, and samples shuffled within a window of some files.

    What is read at a time lies in the files of one window, of two where it passes from one to the next. The order of
    the files depends on the seed and the epoch, that within a window on the window's number too. Of an epoch there is
    the order of the files in memory, and that of one window.

    Args:
        sizes: samples of each file; numbers of samples run from the first file to the last.
        window: files that are shuffled together; the last window of an epoch may have fewer.
        seed: of the stream.
    """

    def __init__(self, sizes: Sequence[int], window: int, seed: int) -> None:
        self.sizes, self.window, self.seed = sizes, window, seed
        self.num_samples = sum(sizes)
        self._firsts = [0, *itertools.accumulate(sizes)]
        self._epoch = -1
        self._files: list[list[int]] = []
        self._ends: list[int] = []
        self._cached: tuple[tuple[int, int], Tensor] = ((-1, -1), torch.empty(0, dtype=torch.long))

    def _stretch(self, position: int) -> Tensor:
        epoch, offset = divmod(position, self.num_samples)
        if self._epoch != epoch:
            order = torch.randperm(len(self.sizes), generator=seeded(self.seed, epoch, 2))
            self._files = [window.tolist() for window in order.split(self.window)]
            self._ends = list(itertools.accumulate(sum(self.sizes[i] for i in files) for files in self._files))
            self._epoch = epoch
        number = bisect.bisect_right(self._ends, offset)
        if self._cached[0] != (epoch, number):
            within = torch.cat([torch.arange(self._firsts[i], self._firsts[i + 1]) for i in self._files[number]])
            order = torch.randperm(len(within), generator=seeded(self.seed, epoch, number, 3))
            self._cached = ((epoch, number), within[order])
        first = self._ends[number - 1] if number else 0
        return self._cached[1][offset - first :]


def read_ahead(file: BinaryIO) -> None:
    """Asks the system to read a whole file, from its first byte to its last, while parts of it are taken in any order.

    A window of files is then one sequential read each on a disk of the network too. What has no memory left for it is
    read when it is taken.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
