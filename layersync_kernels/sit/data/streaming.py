"""Images decoded by worker processes as training goes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from ...errors import DataError
from ..batch import Batch, Condition
from ..modality.images import pixels_to_unit
from ..spec import SampleSpec
from .base import EpochShuffle, SampleSet
from .pixels import image_to_tensor

logger = logging.getLogger(__name__)


# On damaged files Pillow raises OSError (unreadable, unidentified, truncated), SyntaxError (PNG chunks), and whatever
# its plugins run into that meet impossible headers: TypeError, KeyError, ZeroDivisionError, struct.error, ...
DECODE_ERRORS = Exception


@dataclass
class ImageSource:
    """Numbered images behind one interface.

    Attributes:
        count: how many there are.
        load: gives image i and its label; a DataError ends the run, any other `DECODE_ERRORS` is a broken file.
        name: of image i, for messages.
        class_names: one a label.
    """

    count: int
    load: Callable[[int], tuple[Image.Image, int]]
    name: Callable[[int], str]
    class_names: list[str]

    def __len__(self) -> int:
        return self.count


def describe(error: Exception) -> str:
    """What an error says about a file, in a line."""
    return " ".join(str(error).split()) or type(error).__name__


def all_broken_message(broken: dict[str, str]) -> str:
    """Says that nothing could be read, naming the first files."""
    first = "; ".join(f"{name}: {reason}" for name, reason in list(broken.items())[:3])
    return f"none of the {len(broken)} image files can be read ({first}); check the files"


_Item = tuple[int, Tensor, int, dict[str, str]]
"""Number, image, label, and what was broken on the way to it."""


class DecodedImages(TorchDataset[_Item]):
    """Decodes on demand; a broken file is replaced by the next readable one and reported beside it."""

    def __init__(self, source: ImageSource, spec: SampleSpec) -> None:
        self.source, self.channels = source, spec.channels
        self.size = spec.extent[0], spec.extent[1]

    def __getitem__(self, index: int) -> _Item:
        broken: dict[str, str] = {}
        for shift in range(len(self.source)):
            i = (index + shift) % len(self.source)
            try:
                image, label = self.source.load(i)
                return index, image_to_tensor(image, self.size, self.channels), label, broken
            except DataError:
                raise
            except DECODE_ERRORS as error:
                broken[self.source.name(i)] = describe(error)
        raise DataError(all_broken_message(broken))


class _StreamSampler(Sampler[int]):
    def __init__(self, shuffle: EpochShuffle, start: int) -> None:
        self.shuffle, self.start = shuffle, start

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while True:
            yield from self.shuffle.indices(position, 1024).tolist()
            position += 1024


def _collate(items: list[_Item]) -> tuple[Tensor, Tensor, Tensor, dict[str, str]]:
    index, images, labels, broken = zip(*items, strict=True)
    found: dict[str, str] = {}
    for one in broken:
        found |= one
    return torch.tensor(index), torch.stack(images), torch.tensor(labels), found


@dataclass(kw_only=True)
class StreamingSet(SampleSet):
    """Images decoded by worker processes as training goes, for what does not fit in memory."""

    source: ImageSource
    workers: int = 4

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Batch]:
        """See `SampleSet.batches`; the batches are in host memory, pinned where there is a GPU."""
        loader: DataLoader[Any] = DataLoader(
            DecodedImages(self.source, self.spec),
            batch_size=batch_size,
            sampler=_StreamSampler(EpochShuffle(len(self), seed), start),
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            # A worker must not die of the Ctrl-C that asks the trainer to save.
            worker_init_fn=_ignore_interrupt,
        )
        for index, images, labels, broken in loader:
            for name, reason in broken.items():
                if name not in self.broken:
                    self.broken[name] = reason
                    logger.warning("skipped broken file %s (%s); %d so far", name, reason, len(self.broken))
            yield Batch(pixels_to_unit(images), Condition(labels), index)

    def take(self, index: Tensor) -> Batch:
        """See `SampleSet.take`. A broken file is replaced as in `batches`."""
        decoded = DecodedImages(self.source, self.spec)
        with ThreadPoolExecutor(max_workers=max(self.workers, 1)) as pool:
            _, images, labels, _ = _collate(list(pool.map(decoded.__getitem__, index.tolist())))
        return Batch(pixels_to_unit(images), Condition(labels), index)


def _ignore_interrupt(_worker: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
