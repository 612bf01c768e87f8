"""How good a model is, measured the same way for every run: held-out loss and Fréchet distance."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...errors import ConfigError
from ..batch import Condition
from ..config.sampling import SamplingConfig
from ..data.base import SampleSet
from ..diffusion.transport import Transport
from ..modality.base import Modality
from ..models.sit import SiT
from ..sampling.draw import draw
from ..teachers.features import fingerprint
from .arrays import as_arrays, joined
from .controls import kept
from .frechet import RealFeatures, refusal
from .networks import Network
from .validation import CHUNK, HeldOut, take

WITHOUT = "leave the distance out by --quality-network none"
"""What can be done without a network."""


class Judge:
    """Measures models of one data set against the same samples, noise and times.

    Args:
        train: what the models are trained on, the reference of the Fréchet distance.
        held_out: samples that they never see.
        device: where the models are.
        network: features for the Fréchet distance, taken in its `directions`; None leaves it out.
        recorded: the samples of `train` and of `held_out` as they are, where the models see them with a loss; the
            network then sees these.
        source: what the data are called.
        transport: what the models are trained with.
        sampling: how they are sampled.
        autocast_dtype: what they compute in; None for fp32. The network computes in fp32.
        held_out_samples: of them, how many are used.
        reference: real samples behind the Fréchet distance.
        samples: samples to draw for it, with the conditions of real ones.
        folder: where features of real samples are kept, which are computed once per data set; None: nowhere.

    Attributes:
        floor: Fréchet distance of `samples` held-out ones, or of all where there are fewer, which lie further away;
            None without a network, and where they are too few for its dimensions.
        dimensions: in which the Fréchet distance is taken; None without a network.

    Raises:
        ConfigError: too few samples for the dimensions of the network.
        DataError: latents whose autoencoder is not here.
        TeacherError: features that are not finite.
    """

    def __init__(
        self,
        train: SampleSet,
        held_out: SampleSet,
        device: torch.device,
        network: Network | None,
        *,
        recorded: tuple[SampleSet, SampleSet] | None = None,
        source: str,
        transport: Transport,
        sampling: SamplingConfig,
        autocast_dtype: torch.dtype | None,
        held_out_samples: int,
        reference: int,
        samples: int,
        folder: Path | None = None,
    ) -> None:
        self._transport, self._sampling, self._autocast_dtype = transport, sampling, autocast_dtype
        self._held_out = HeldOut(held_out, held_out_samples, device)
        self._network, self._source, self._modality, self._folder = network, source, train.modality, folder
        self.floor: float | None = None
        self.dimensions: int | None = None
        if network is None:
            return
        real, others = recorded or (train, held_out)
        reference = min(reference, len(real))
        floor = self._real(others, min(samples, held_out_samples))
        width = floor.shape[1]
        dimensions = min(network.directions or width, width)
        if (refused := refusal(samples, reference, dimensions)) is not None:  # before thousands are looked at
            raise ConfigError(
                f"a Fréchet distance by {network.name} of {refused}, at least {dimensions + 1} by --samples, and as "
                f"many training samples by --reference; or {WITHOUT}"
            )
        self._reference = RealFeatures(self._real(real, reference), network.directions)
        self.dimensions = self._reference.dimensions
        if self._reference.refusal(len(floor)) is None:
            self.floor = self._reference.distance(floor)
        given = Condition.cat([batch.condition for batch in take(train, min(samples, reference))])
        self._condition = given[torch.arange(samples, device=given.labels.device) % len(given)].to(device)

    def validation_loss(self, model: SiT) -> float:
        """The training loss on the held-out samples, without alignment."""
        return self._held_out.loss(model, self._transport, self._autocast_dtype)

    def frechet(self, model: SiT) -> float | None:
        """The Fréchet distance between samples of the model and real ones; None without a network."""
        if self._network is None:
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
        parts = zip(drawn.split(CHUNK), self._condition.split(CHUNK), strict=True)
        return self._reference.distance(
            torch.cat([self._features(self._modality, own, given.lengths, "drawn") for own, given in parts])
        )

    def _real(self, data: SampleSet, count: int) -> Tensor:
        """Features of the first samples of the shuffled stream of seed 0."""
        assert self._network is not None

        def compute() -> dict[str, Tensor]:
            batches = take(data, count)
            own = [self._features(data.modality, b.samples, b.condition.lengths, "real") for b in batches]
            return {"features": torch.cat(own)}

        if self._folder is None:
            return compute()["features"]
        facts = {"network": self._network.identity, "data": fingerprint(data), "count": count}
        return kept(self._folder, "judged", facts, compute)["features"]

    def _features(self, modality: Modality, samples: Tensor, lengths: Tensor | None, what: str) -> Tensor:
        """Those (N, F) of samples (N, C, ...)."""
        assert self._network is not None
        arrays = as_arrays(modality, samples.cpu(), lengths, self._source, otherwise=WITHOUT)
        return self._network(joined([arrays]), what).features
