"""Sets of posteriors of an autoencoder: in memory, or read from their files as training goes."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import DataError
from ..batch import WHOLE, Batch, Condition, Share, within_lengths
from .base import SampleSet, Shuffle, requests
from .draws import draw
from .latents_index import LatentsIndex, shard_name
from .remote import ShardCache
from .shards import ShardShuffle, read_ahead
from .workers import read_by_workers

_Read = tuple[Tensor, Tensor, "Tensor | None", Tensor, "Tensor | None"]
"""Samples, labels, lengths, index, mirrored: what a worker sends."""


@dataclass(kw_only=True)
class PosteriorSet(SampleSet):
    """Posteriors of an autoencoder; each time a sample is taken for training it is drawn anew. A subclass gives `rows`.

    Attributes:
        posterior: whether samples are drawn; else they are the means.
        flip: whether half of the samples are latents of mirrored ones.
    """

    posterior: bool
    flip: bool

    @abstractmethod
    def rows(self, name: str, index: Tensor) -> Tensor:
        """Of samples (B,) the "mean" or "std" (B, c, ...), those "_mirrored", the "labels" or "lengths" (B,)."""

    def take(self, index: Tensor) -> Batch:
        """See `SampleSet.take`; the means, not mirrored."""
        return self._batch(index, None, None)

    def batches(self, batch_size: int, *, seed: int, start: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """See `SampleSet.batches`; what is drawn for a sample follows from the seed and its position."""
        for positions, numbers in requests(self.order(seed), batch_size, start, share):
            yield self.drawn(positions, numbers, seed)

    def drawn(self, positions: Tensor, numbers: Tensor, seed: int) -> Batch:
        """Samples at positions of the stream, int64 (B,) both."""
        mirrored, noise = draw(seed, positions, self.spec.shape if self.posterior else (0,))
        return self._batch(numbers, mirrored if self.flip else None, noise if self.posterior else None)

    def _batch(self, index: Tensor, mirrored: Tensor | None, noise: Tensor | None) -> Batch:
        mean = self._chosen("mean", index, mirrored)
        values = mean.float() if noise is None else noise.mul_(self._chosen("std", index, mirrored)).add_(mean)
        samples = self.modality.normalise(values)
        lengths = self.rows("lengths", index) if self.spec.variable else None
        if lengths is not None:
            samples = torch.where(within_lengths(lengths, samples), samples, 0)
        if mirrored is not None:
            mirrored = mirrored.view(-1, *[1] * (samples.ndim - 1))
        return Batch(samples, Condition(self.rows("labels", index), lengths), index, mirrored)

    def _chosen(self, name: str, index: Tensor, mirrored: Tensor | None) -> Tensor:
        if mirrored is None:
            return self.rows(name, index)
        plain, other = (~mirrored).nonzero().flatten(), mirrored.nonzero().flatten()
        both = torch.cat([self.rows(name, index[plain]), self.rows(f"{name}_mirrored", index[other])])
        return both.index_select(0, torch.cat([plain, other]).argsort())


@dataclass(kw_only=True)
class LatentSet(PosteriorSet):
    """Posteriors that are all in memory.

    Attributes:
        parts: "mean" and "std" (N, c, ...), those "_mirrored", "labels" (N,) and "lengths" (N,).
    """

    parts: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.parts["mean"])

    def rows(self, name: str, index: Tensor) -> Tensor:
        """See `PosteriorSet.rows`."""
        return self.parts[name].index_select(0, index)


class ShardFiles:
    """Numbered files of latents, of which the last few that were asked for are open.

    They are mapped: the system reads the pages of the rows that are asked for, and may forget them again.

    Args:
        folder: of the files, or a URL.
        index: what they hold.
        limit: files open at a time, at least 1.
        cache: for files behind URLs.
    """

    def __init__(self, folder: str, index: LatentsIndex, *, limit: int, cache: ShardCache) -> None:
        self.folder, self.index, self.limit, self.cache = folder.rstrip("/"), index, limit, cache
        self._open: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    @property
    def opened(self) -> int:
        """How many are open."""
        return len(self._open)

    def place(self, number: int) -> str:
        """Where a file is."""
        return f"{self.folder}/{shard_name(number)}"

    def tensors(self, number: int) -> dict[str, Tensor]:
        """What a file holds.

        Raises:
            DataError: it cannot be read, or does not fit the index; names it.
        """
        if number not in self._open:
            while len(self._open) >= self.limit:
                self._open.popitem(last=False)
            self._open[number] = self._read(number, ahead=True)
        self._open.move_to_end(number)
        return self._open[number]

    def check(self) -> None:
        """Reads the headers and labels of all files, which takes a fraction of a millisecond each.

        Raises:
            DataError: as `tensors` does.
        """
        for number in range(self.index.files):
            self._read(number, ahead=False)

    def _read(self, number: int, *, ahead: bool) -> dict[str, Tensor]:
        place = self.place(number)
        opener = functools.partial(_mapped, ahead=ahead)
        try:
            found = self.cache.open(place, opener)
        except SafetensorError as error:
            raise DataError(f"cannot read {place}: {error}; write it anew") from error
        except OSError as error:
            raise DataError(f"cannot read {place}: {error}; is it still there?") from error
        try:
            self.index.check(number, found)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        return found


def _mapped(path: Path, *, ahead: bool) -> dict[str, Tensor]:
    if ahead:
        with path.open("rb") as whole:
            read_ahead(whole)
    with safe_open(path, framework="pt") as file:  # refuses a header that does not fit the file's length
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@dataclass(kw_only=True)
class StreamedLatents(PosteriorSet):
    """Posteriors read from their files as training goes, by worker processes, for what does not fit in memory.

    Attributes:
        files: where they are; each worker opens its own.
        window: files whose samples are shuffled together, see `ShardShuffle`.
        workers: processes.
        prefetch: batches that a worker prepares.
    """

    files: ShardFiles
    window: int
    workers: int = 4
    prefetch: int = 2

    def __len__(self) -> int:
        return self.files.index.samples

    def order(self, seed: int) -> Shuffle:
        """See `SampleSet.order`."""
        return ShardShuffle(self.files.index.sizes, self.window, seed)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """See `PosteriorSet.rows`."""
        latent = name not in ("labels", "lengths")
        shape = self.spec.shape if latent else ()
        found = torch.empty(len(index), *shape, dtype=torch.float16 if latent else torch.int64)
        owners = index // self.files.index.shard
        order = owners.argsort(stable=True)
        numbers, counts = owners.unique(return_counts=True)
        sizes, place = counts.tolist(), 0
        for number, own in zip(numbers.tolist(), index[order].split(sizes), strict=True):
            part = self.files.tensors(number)[name]
            first = number * self.files.index.shard
            torch.index_select(part, 0, own - first, out=found[place : place + len(own)])
            place += len(own)
        if latent and len(index) and not torch.stack(found.aminmax()).isfinite().all():  # NaN if there is one; one pass
            bad = found.isfinite().flatten(1).all(1).logical_not().nonzero()[0]
            raise DataError(f"{self.files.place(int(owners[order[bad]]))} holds NaN or infinity; write it anew")
        return found.index_select(0, order.argsort())

    def batches(self, batch_size: int, *, seed: int, start: int = 0, share: Share = WHOLE) -> Iterator[Batch]:
        """See `SampleSet.batches`; the batches are in host memory, pinned where there is a GPU.

        Raises:
            DataError: as it is iterated: a file cannot be read or is damaged, or a worker process died.
        """

        def read(positions: Tensor, numbers: Tensor) -> _Read:
            batch = self.drawn(positions, numbers, seed)
            return batch.samples, batch.labels, batch.condition.lengths, batch.index, batch.mirrored

        wanted = requests(self.order(seed), batch_size, start, share)
        for samples, labels, lengths, index, mirrored in read_by_workers(read, wanted, self.workers, self.prefetch):
            yield Batch(samples, Condition(labels, lengths), index, mirrored)
