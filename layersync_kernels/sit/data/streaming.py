"""Samples decoded by worker processes as training goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from ...errors import DataError
from ..batch import Batch, Condition
from ..modality.images import pixels_to_unit
from .base import EpochShuffle, SampleSet

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


class Decoded(TorchDataset[_Item]):
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


class _StreamSampler(Sampler[int]):
    def __init__(self, shuffle: EpochShuffle, start: int) -> None:
        self.shuffle, self.start = shuffle, start

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while True:
            yield from self.shuffle.indices(position, 1024).tolist()
            position += 1024


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
    """

    source: Source[Tensor]
    workers: int = 4

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Batch]:
        """See `SampleSet.batches`; the batches are in host memory, pinned where there is a GPU."""
        loader: DataLoader[Any] = DataLoader(
            Decoded(self.source),
            batch_size=batch_size,
            sampler=_StreamSampler(EpochShuffle(len(self), seed), start),
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            # A worker must not die of the Ctrl-C that asks the trainer to save.
            worker_init_fn=_ignore_interrupt,
        )
        for index, pixels, labels, broken in loader:
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


def _ignore_interrupt(_worker: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
