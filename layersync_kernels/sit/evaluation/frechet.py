"""Fréchet distance of generated samples to real ones, in the features of a pretrained network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import Estimate, bootstrap


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

    def __init__(self, features: Tensor, directions: int | None) -> None:
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
        """Why the distance of so many samples would say nothing, see `refusal`; None where it does."""
        return refusal(count, len(self.seen), self.dimensions)


def refusal(count: int, real: int, dimensions: int) -> str | None:
    """Why the distance of `count` samples to `real` ones would say nothing; None where it does.

    The covariance of N samples has at most rank N - 1: below the number of dimensions, the distance measures how few
    there are.
    """
    if min(count, real) > dimensions:
        return None
    return f"{count} samples and {real} real ones for {dimensions} dimensions: more are needed"
