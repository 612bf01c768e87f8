"""What is done to samples at random as training goes."""

from __future__ import annotations

import torch
from torch import Tensor


def mirror(samples: Tensor) -> Tensor:
    """Samples (B, C, ..., W), left and right exchanged."""
    return samples.flip(-1)


def random_mirror(samples: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Mirrors each sample with a chance of one half.

    Args:
        samples: (B, C, ..., W).
        generator: draws one number a sample; on their device.

    Returns:
        The samples, and which of them are mirrored: bool (B, 1, ..., 1), what `Features.tokens` takes.
    """
    shape = (len(samples), *[1] * (samples.ndim - 1))
    mirrored = torch.rand(shape, device=samples.device, generator=generator) < 0.5
    return torch.where(mirrored, mirror(samples), samples), mirrored
