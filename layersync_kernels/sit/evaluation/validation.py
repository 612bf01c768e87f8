"""Held-out samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import ConfigError
from ..data.base import SampleSet
from ..data.memory import MemorySet

CHUNK = 256


def hold_out(data: SampleSet, count: int) -> tuple[SampleSet, SampleSet]:
    """Splits off `count` samples, the same ones whatever the seed of a run: the rest, and these.

    Raises:
        ConfigError: the data is streamed, or has not that many samples to spare.
    """
    if not isinstance(data, MemorySet):
        raise ConfigError(
            "samples can be held out only from data that fits in memory; raise --memory-limit-gb or give --validation"
        )
    if not 0 < count < len(data):
        raise ConfigError(f"--held-out {count}: the data has {len(data)} samples; expected 1 to {len(data) - 1}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return subset(data, order[count:].sort().values), subset(data, order[:count])


def subset(data: MemorySet, index: Tensor) -> MemorySet:
    """The samples of these numbers, of the same classes."""
    index = index.to(data.samples.device)
    return dataclasses.replace(data, samples=data.samples[index], labels=data.labels[index])


def take(data: SampleSet, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` samples of the shuffled stream of seed 0, or all there are, in chunks."""
    left = min(count, len(data))
    for samples, labels in data.batches(min(CHUNK, left), seed=0):
        yield samples[:left], labels[:left]
        left -= len(samples)
        if left <= 0:
            return
