"""How good a model in training is, measured the same way for every run: held-out loss and Fréchet distance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data.base import SampleSet
from ..sampling.draw import draw
from ..teachers.networks import load_teacher
from ..training.loop import Trainer
from .frechet import DIRECTIONS, Gaussian, frechet_distance
from .validation import CHUNK, take

FeatureNetwork = Callable[[Tensor], Tensor]
"""Pixels in [-1, 1] (B, C, H, W) to features (B, F)."""


def load_network(name: str, device: torch.device, autocast_dtype: torch.dtype | None) -> FeatureNetwork:
    """The pretrained network of that name, see `load_teacher`; its last features are averaged over the image."""
    network = load_teacher(name, last=True).to(device)

    def features(images: Tensor) -> Tensor:
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            return network(images).float().mean(1)

    return features


class Judge:
    """Measures trainers of one data set against the same samples, noise and times.

    Args:
        train: what the models are trained on, the reference of the Fréchet distance.
        held_out: samples that they never see.
        device: where the models are.
        network: features for the Fréchet distance; None leaves it out.
        reference: real samples behind the Fréchet distance.
        samples: samples to draw for it.

    Attributes:
        floor: Fréchet distance of `samples` held-out ones, or of all where there are fewer, which lie further away;
            None without a network.
    """

    def __init__(
        self,
        train: SampleSet,
        held_out: SampleSet,
        device: torch.device,
        network: FeatureNetwork | None,
        *,
        held_out_samples: int,
        reference: int,
        samples: int,
    ) -> None:
        self._device = device
        self._network = network
        generator = torch.Generator().manual_seed(0)
        self._held_out = []
        count = min(held_out_samples, len(held_out))
        times = ((torch.arange(count) + 0.5) / count).split(CHUNK)  # every time equally often, not at random
        for (x, y), t in zip(take(held_out, count), times, strict=True):
            noise = torch.randn(x.shape, generator=generator)
            self._held_out.append(tuple(tensor.to(device) for tensor in (x, y, noise, t)))
        self.floor: float | None = None
        if network is None:
            return
        chunks = list(take(train, reference))
        labels = torch.cat([y for _, y in chunks])
        self._labels = labels.repeat(-(-samples // len(labels)))[:samples].to(device)
        real = self._features(torch.cat([x for x, _ in chunks]))
        _, directions = torch.linalg.eigh(torch.cov(real.double().T))
        self._directions = directions[:, -DIRECTIONS:]
        self._real = self._gaussian(real)
        unseen = self._features(torch.cat([x for x, *_ in self._held_out])[:samples])
        self.floor = frechet_distance(self._gaussian(unseen), self._real)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        assert self._network is not None
        return torch.cat([self._network(chunk.to(self._device)) for chunk in images.split(CHUNK)])

    def _gaussian(self, features: Tensor) -> Gaussian:
        return Gaussian.of(features.double() @ self._directions)

    @torch.no_grad()
    def validation_loss(self, trainer: Trainer) -> float:
        """The training loss of the averaged weights on the held-out samples, without alignment."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        low, high = trainer.transport.interval(trainer.transport.train_eps)
        for x, y, noise, t in self._held_out:
            with torch.autocast(self._device.type, trainer.autocast_dtype, enabled=trainer.autocast_dtype is not None):
                terms = trainer.transport.training_losses(trainer.ema, x, {"y": y}, t=low + (high - low) * t, x0=noise)
            total += terms["loss"].double().sum()
        return float(total) / sum(len(x) for x, *_ in self._held_out)

    def frechet(self, trainer: Trainer) -> float | None:
        """The Fréchet distance between samples of the averaged weights and real ones; None without a network."""
        if self._network is None:
            return None
        drawn = draw(
            trainer.ema,
            trainer.transport,
            trainer.config.sampling,
            self._labels,
            seed=0,  # the same noise for every run
            autocast_dtype=trainer.autocast_dtype,
            batch_size=CHUNK,
        )
        return frechet_distance(self._gaussian(self._features(drawn.clamp(-1, 1))), self._real)
