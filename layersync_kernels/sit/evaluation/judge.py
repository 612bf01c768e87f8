"""How good a model is, measured the same way for every run: held-out loss and Fréchet distance."""

from __future__ import annotations

import torch

from ..batch import Condition
from ..config.sampling import SamplingConfig
from ..data.base import SampleSet
from ..diffusion.transport import Transport
from ..models.sit import SiT
from ..sampling.draw import draw
from .frechet import FeatureNetwork, RealSamples
from .validation import CHUNK, HeldOut, take


class Judge:
    """Measures models of one data set against the same samples, noise and times.

    Args:
        train: what the models are trained on, the reference of the Fréchet distance.
        held_out: samples that they never see.
        device: where the models are.
        network: features for the Fréchet distance; None leaves it out.
        transport: what the models are trained with.
        sampling: how they are sampled.
        autocast_dtype: what they compute in; None for fp32.
        held_out_samples: of them, how many are used.
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
        transport: Transport,
        sampling: SamplingConfig,
        autocast_dtype: torch.dtype | None,
        held_out_samples: int,
        reference: int,
        samples: int,
    ) -> None:
        self._transport, self._sampling, self._autocast_dtype = transport, sampling, autocast_dtype
        self._held_out = HeldOut(held_out, held_out_samples, device)
        self.floor: float | None = None
        self._real: RealSamples | None = None
        if network is None:
            return
        chunks = list(take(train, reference))
        given = Condition.cat([batch.condition for batch in chunks])
        self._condition = given[torch.arange(samples, device=given.labels.device) % len(given)].to(device)
        self._real = RealSamples(torch.cat([batch.samples for batch in chunks]), network, device)
        self.floor = self._real.distance(self._held_out.images[:samples])

    def validation_loss(self, model: SiT) -> float:
        """The training loss on the held-out samples, without alignment."""
        return self._held_out.loss(model, self._transport, self._autocast_dtype)

    def frechet(self, model: SiT) -> float | None:
        """The Fréchet distance between samples of the model and real ones; None without a network."""
        if self._real is None:
            return None
        drawn = draw(
            model,
            self._transport,
            self._sampling,
            self._condition,
            seed=0,  # the same noise for every model
            autocast_dtype=self._autocast_dtype,
            batch_size=CHUNK,
        )
        return self._real.distance(drawn.clamp(-1, 1))
