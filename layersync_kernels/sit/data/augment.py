"""What is done to samples at random as training goes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..batch import WHOLE, Batch, Share


def mirror(samples: Tensor) -> Tensor:
    """Samples (B, C, ..., W), left and right exchanged."""
    return samples.flip(-1)


def random_mirror(batch: Batch, *, generator: torch.Generator | None = None, share: Share = WHOLE) -> Batch:
    """Mirrors each sample along its last axis with a chance of one half, and notes which.

    Args:
        batch: of samples (B, C, ..., W).
        generator: draws one number a sample; on their device.
        share: what `batch` is of one that several processes have together.
    """
    samples = batch.samples
    shape = (len(samples) * share.world, *[1] * (samples.ndim - 1))
    mirrored = share.of(torch.rand(shape, device=samples.device, generator=generator)) < 0.5
    return dataclasses.replace(batch, samples=torch.where(mirrored, mirror(samples), samples), mirrored=mirrored)
