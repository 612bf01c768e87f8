"""What every data set is, and the order in which its samples come."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..batch import WHOLE, Batch, Share
from ..files import atomic_path
from ..modality.base import Modality
from ..modality.images import Images
from ..modality.latents import Latents
from ..spec import SampleSpec

logger = logging.getLogger(__name__)

BROKEN = "broken_files.txt"
"""Name of the list of broken files in a run's folder."""


def seeded(*numbers: int) -> torch.Generator:
    """A generator on the CPU of numbers from 0 on, which are mixed: those of (0, 1) and of (1, 0) differ."""
    mixed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(mixed >> 1)


class Shuffle(ABC):
    """The endless shuffled stream of sample numbers: what stands at a position follows from the seed alone.

    A subclass gives `_stretch`.
    """

    @abstractmethod
    def _stretch(self, position: int) -> Tensor:
        """The sample numbers from a position on, up to where another order begins: int64, at least one."""

    def indices(self, start: int, count: int) -> Tensor:
        """Sample numbers at positions start .. start+count-1: int64 (count,).

        Raises:
            ValueError: `start` below 0.
        """
        if start < 0:
            raise ValueError(f"the stream of samples has no position {start}; expected one from 0 on")
        pieces = []
        while count > 0:
            piece = self._stretch(start)[:count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.cat(pieces)


class EpochShuffle(Shuffle):
    """Epoch after epoch, each in its own order.

    Position p belongs to epoch p // n; the order of an epoch depends on the seed and the epoch's number only.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self._cached: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.long))

    def _stretch(self, position: int) -> Tensor:
        epoch, offset = divmod(position, self.num_samples)
        if self._cached[0] != epoch:
            self._cached = (epoch, torch.randperm(self.num_samples, generator=seeded(self.seed, epoch)))
        return self._cached[1][offset:]


def requests(order: Shuffle, batch_size: int, start: int, share: Share) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch from position `start` on the positions and the sample numbers of a share, int64 (b,) both."""
    while True:
        numbers = order.indices(start, batch_size)
        yield share.of(torch.arange(start, start + batch_size)), share.of(numbers)
        start += batch_size


@dataclass(kw_only=True)
class SampleSet(ABC):
    """Samples of one shape. A subclass gives `__len__` and `take`.

    Attributes:
        spec: the shape of one sample.
        num_classes: labels lie in [0, num_classes).
        class_names: one name per class.
        modality: what samples stand for.
        broken: what could not be read, by file name, with the reason.
        captions: some that the samples have, to draw others with.
        text_encoder: what their embeddings are made with; None where there are none.
    """

    spec: SampleSpec
    num_classes: int
    class_names: list[str]
    modality: Modality = field(default_factory=Images)
    broken: dict[str, str] = field(default_factory=dict)
    captions: tuple[str, ...] = ()
    text_encoder: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, index: Tensor) -> Batch:
        """The samples of these numbers, int64 (B,) on the CPU, which is the `index` of what it returns."""

    def batches(self, batch_size: int, *, seed: int, start: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """Endless batches from position `start` of the shuffled stream of that seed.

        Args:
            batch_size: samples of a batch of all processes.
            seed: of the stream, and of what is drawn for its samples.
            start: position in the stream.
            share: what is given of each batch.
        """
        for _, numbers in requests(self.order(seed), batch_size, start, share):
            yield self.take(numbers)

    def order(self, seed: int) -> Shuffle:
        """The shuffled stream of that seed."""
        return EpochShuffle(len(self), seed)

    @property
    def latent(self) -> bool:
        """Whether samples are latents of an autoencoder, of which there are no pixels."""
        return isinstance(self.modality, Latents)

    @property
    def text_width(self) -> int | None:
        """Channels of the words of texts; None: there are none."""
        return None

    def typical_lengths(self) -> tuple[tuple[int, ...], ...]:
        """Lengths to draw samples with, some for each class; empty where samples are all full."""
        return ()


def write_broken(folder: Path, broken: Mapping[str, str]) -> None:
    """Lists in ``broken_files.txt`` what could not be read: a line each, the name as its bytes are on the disk.

    A disk that is full gets a warning instead: the list is for the user, and training does not need it.
    """
    text = "".join(f"{name}\t{' '.join(reason.split())}\n" for name, reason in broken.items())
    try:
        with atomic_path(folder / BROKEN) as temporary:
            temporary.write_bytes(text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        logger.warning("cannot write %s: %s", folder / BROKEN, error)
