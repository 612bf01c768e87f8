"""Samples that training never sees, and the loss on them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import ConfigError
from ..batch import Batch
from ..data.base import SampleSet
from ..data.memory import MemorySet
from ..diffusion.transport import Transport
from ..models.sit import SiT

CHUNK = 256
"""Samples in one forward pass."""


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
    return data.subset(order[count:].sort().values), data.subset(order[:count])


def take(data: SampleSet, count: int) -> Iterator[Batch]:
    """The first `count` samples of the shuffled stream of seed 0, or all there are, in chunks."""
    left = min(count, len(data))
    for batch in data.batches(min(CHUNK, left), seed=0):
        yield batch[:left]
        left -= len(batch)
        if left <= 0:
            return


class HeldOut:
    """Held-out samples, each with a noise and a time of its own that every model gets alike.

    Args:
        data: where they come from.
        count: how many, or all there are.
        device: where the models are.
    """

    def __init__(self, data: SampleSet, count: int, device: torch.device) -> None:
        count = min(count, len(data))
        generator = torch.Generator().manual_seed(0)
        times = ((torch.arange(count) + 0.5) / count).split(CHUNK)  # every time equally often, not at random
        self._device = device
        self._chunks = []
        for batch, t in zip(take(data, count), times, strict=True):
            noise = torch.randn(batch.samples.shape, generator=generator)
            self._chunks.append((batch.to(device), noise.to(device), t.to(device)))

    @property
    def images(self) -> Tensor:
        """The samples (N, C, ...)."""
        return torch.cat([batch.samples for batch, *_ in self._chunks])

    @torch.no_grad()
    def loss(self, model: SiT, transport: Transport, autocast_dtype: torch.dtype | None) -> float:
        """The mean training loss of `transport`, without alignment; in fp32 if `autocast_dtype` is None."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        low, high = transport.interval(transport.train_eps)
        for batch, noise, t in self._chunks:
            with torch.autocast(self._device.type, autocast_dtype, enabled=autocast_dtype is not None):
                given = batch.condition.keywords()
                terms = transport.training_losses(model, batch.samples, given, t=low + (high - low) * t, x0=noise)
            total += terms["loss"].double().sum()
        return float(total) / sum(len(batch) for batch, *_ in self._chunks)
