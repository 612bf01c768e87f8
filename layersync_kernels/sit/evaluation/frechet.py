"""Fréchet distance of generated samples to real ones, in the features of a pretrained network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..teachers.networks import load_teacher
from .metrics import Estimate, bootstrap
from .validation import CHUNK

DIRECTIONS = 256
"""Principal directions of the real features in which the Fréchet distance is taken: 1,000 samples cannot fill more."""

FeatureNetwork = Callable[[Tensor], Tensor]
"""Pixels in [-1, 1] (B, C, H, W) to features (B, F)."""


def load_network(name: str, device: torch.device, autocast_dtype: torch.dtype | None) -> FeatureNetwork:
    """The pretrained network of that name, see `load_teacher`; its last features are averaged over the image.

    Raises:
        TeacherError: unknown, or it cannot be loaded.
    """
    network = load_teacher(name, last=True).to(device)

    def features(images: Tensor) -> Tensor:
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            return network(images).float().mean(1)

    return features


@dataclass(frozen=True)
class Gaussian:
    """Mean (F,) and covariance (F, F) of features, fp64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """That of features (N, F), N at least 2."""
        return cls(features.double().mean(0), torch.cov(features.double().T))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½), the squared Wasserstein-2 distance of two Gaussians."""
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # (S1 S2)^½ has the trace of (S1^½ S2 S1^½)^½, whose argument is symmetric.
    cross = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp_min(0).sqrt().sum()
    traces = first.covariance.trace() + second.covariance.trace() - 2 * cross
    return float((first.mean - second.mean).square().sum() + traces)


class RealFeatures:
    """Features of real samples, to which a Fréchet distance is taken.

    Args:
        features: (N, F), N at least 2.
        directions: principal directions of these features in which the distance is taken; None: all F dimensions.
    """

    def __init__(self, features: Tensor, directions: int | None = DIRECTIONS) -> None:
        self._basis: Tensor | None = None
        if directions is not None and directions < features.shape[1]:
            _, vectors = torch.linalg.eigh(torch.cov(features.double().T))
            self._basis = vectors[:, -directions:]
        self.seen = self.project(features)
        self._gaussian = Gaussian.of(self.seen)

    @property
    def dimensions(self) -> int:
        """In which the distance is taken."""
        return self.seen.shape[1]

    def project(self, features: Tensor) -> Tensor:
        """Features (M, F) in these dimensions: fp64 (M, D)."""
        return features.double() if self._basis is None else features.double() @ self._basis

    def distance(self, features: Tensor) -> float:
        """The Fréchet distance of other features (M, F), M at least 2."""
        return frechet_distance(Gaussian.of(self.project(features)), self._gaussian)

    def estimate(self, features: Tensor, times: int) -> Estimate:
        """`distance`, with the interval of resamples of both sets."""
        return bootstrap(
            lambda other, own: frechet_distance(Gaussian.of(other), Gaussian.of(own)),
            (self.project(features), self.seen),
            times,
        )

    def refusal(self, count: int) -> str | None:
        """Why the distance of so many samples would say nothing; None where it does.

        The covariance of N samples has at most rank N - 1: below the number of dimensions, the distance measures how
        few there are.
        """
        least = min(count, len(self.seen))
        if least > self.dimensions:
            return None
        return f"{count} samples and {len(self.seen)} real ones for {self.dimensions} dimensions: more are needed"


class RealSamples:
    """Real samples as a network sees them.

    Args:
        images: pixels in [-1, 1] (N, C, H, W), N at least 2.
        network: what gives the features.
        device: where the network is.
    """

    def __init__(self, images: Tensor, network: FeatureNetwork, device: torch.device) -> None:
        self._network, self._device = network, device
        self._real = RealFeatures(self._features(images))

    def distance(self, images: Tensor) -> float:
        """The Fréchet distance of other samples (M, C, H, W), M at least 2, in the principal directions of the real."""
        return self._real.distance(self._features(images))

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self._network(chunk.to(self._device)) for chunk in images.split(CHUNK)])
