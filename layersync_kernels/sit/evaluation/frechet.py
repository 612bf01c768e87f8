"""Fréchet distance of two sets of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DIRECTIONS = 256
"""Principal directions of the real features in which the Fréchet distance is taken: 1,000 samples cannot fill more."""


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
