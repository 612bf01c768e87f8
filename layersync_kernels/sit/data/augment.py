"""What is done to samples at random as training goes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..batch import Batch


def mirror(samples: Tensor) -> Tensor:
    """Samples (B, C, ..., W), left and right exchanged."""
    return samples.flip(-1)


def random_mirror(batch: Batch, *, generator: torch.Generator | None = None) -> Batch:
    """Mirrors each sample along its last axis with a chance of one half, and notes which.

    Args:
        batch: of samples (B, C, ..., W).
        generator: draws one number a sample; on their device.
    """
    samples = batch.samples
    shape = (len(samples), *[1] * (samples.ndim - 1))
    mirrored = torch.rand(shape, device=samples.device, generator=generator) < 0.5
    return dataclasses.replace(batch, samples=torch.where(mirrored, mirror(samples), samples), mirrored=mirrored)
