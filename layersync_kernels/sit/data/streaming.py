"""Samples decoded by worker processes as training goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ...errors import DataError
from ..batch import WHOLE, Batch, Condition, Share
from ..modality.images import pixels_to_unit
from .base import SampleSet, Shuffle, requests
from .shards import ShardShuffle
from .workers import read_by_workers

logger = logging.getLogger(__name__)


# On damaged files Pillow raises OSError (unreadable, unidentified, truncated), SyntaxError (PNG chunks), and whatever
# its plugins run into that meet impossible headers: TypeError, KeyError, ZeroDivisionError, struct.error, ...
DECODE_ERRORS = Exception


V = TypeVar("V")


@dataclass
class Source(Generic[V]):
    """Numbered images or clips behind one interface.

    Attributes:
        count: how many there are.
        load: gives number i and its label; a DataError ends the run, any other `DECODE_ERRORS` is a broken file.
        name: of the file of number i, for messages.
        class_names: one a label.
        what: they are, in the plural, for messages.
    """

    count: int
    load: Callable[[int], tuple[V, int]]
    name: Callable[[int], str]
    class_names: list[str]
    what: str = "image files"

    def __len__(self) -> int:
        return self.count


def describe(error: Exception) -> str:
    """What an error says about a file, in a line."""
    return " ".join(str(error).split()) or type(error).__name__


def all_broken_message(broken: dict[str, str], what: str) -> str:
    """Says that nothing could be read, naming the first files."""
    first = "; ".join(f"{name}: {reason}" for name, reason in list(broken.items())[:3])
    return f"none of the {len(broken)} {what} can be read ({first}); check the files"


_Item = tuple[int, Tensor, int, dict[str, str]]
"""Number, pixels, label, and what was broken on the way to it."""


class Decoded:
    """Decodes on demand; a broken file is replaced by the next readable one and reported beside it."""

    def __init__(self, source: Source[Tensor]) -> None:
        self.source = source

    def __getitem__(self, index: int) -> _Item:
        broken: dict[str, str] = {}
        for shift in range(len(self.source)):
            i = (index + shift) % len(self.source)
            try:
                return index, *self.source.load(i), broken
            except DataError:
                raise
            except DECODE_ERRORS as error:
                broken[self.source.name(i)] = describe(error)
        raise DataError(all_broken_message(broken, self.source.what))


def _collate(items: list[_Item]) -> tuple[Tensor, Tensor, Tensor, dict[str, str]]:
    index, pixels, labels, broken = zip(*items, strict=True)
    found: dict[str, str] = {}
    for one in broken:
        found |= one
    return torch.tensor(index), torch.stack(pixels), torch.tensor(labels), found


@dataclass(kw_only=True)
class StreamingSet(SampleSet):
    """Pixels decoded by worker processes as training goes, for what does not fit in memory.

    Attributes:
        source: gives uint8 of the shape of `spec`.
        workers: processes; in `take` threads.
        prefetch: batches that a worker prepares.
        files: samples of each file, where they lie in files of many: those are read a window at a time; empty: each
            is a file.
        window: files of a window, see `ShardShuffle`.
    """

    source: Source[Tensor]
    workers: int = 4
    prefetch: int = 2
    files: Sequence[int] = ()
    window: int = 1

    def __len__(self) -> int:
        return len(self.source)

    def order(self, seed: int) -> Shuffle:
        """See `SampleSet.order`."""
        return ShardShuffle(self.files, self.window, seed) if self.files else super().order(seed)

    def batches(self, batch_size: int, *, seed: int, start: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """See `SampleSet.batches`; the batches are in host memory, pinned where there is a GPU.

        Raises:
            DataError: as it is iterated: no file can be read, or a worker process died.
        """
        decoded = Decoded(self.source)

        def read(_positions: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, str]]:
            return _collate([decoded[i] for i in numbers.tolist()])

        wanted = requests(self.order(seed), batch_size, start, share)
        for index, pixels, labels, broken in read_by_workers(read, wanted, self.workers, self.prefetch):
            for name, reason in broken.items():
                if name not in self.broken:
                    self.broken[name] = reason
                    logger.warning("skipped broken file %s (%s); %d so far", name, reason, len(self.broken))
            yield Batch(pixels_to_unit(pixels), Condition(labels), index)

    def take(self, index: Tensor) -> Batch:
        """See `SampleSet.take`. A broken file is replaced as in `batches`."""
        decoded = Decoded(self.source)
        with ThreadPoolExecutor(max_workers=max(self.workers, 1)) as pool:
            _, pixels, labels, _ = _collate(list(pool.map(decoded.__getitem__, index.tolist())))
        return Batch(pixels_to_unit(pixels), Condition(labels), index)
