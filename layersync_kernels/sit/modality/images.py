"""Images, and latents of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..files import add_suffix
from .base import Modality
from .pictures import enlarged, save_picture, tiled, to_image

GAP = 2
"""Pixels between the samples of a grid."""


def pixels_to_unit(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def unit_to_pixels(images: Tensor) -> Tensor:
    """Floats in [-1, 1] (clamped) to uint8 0..255."""
    return images.float().add(1.0).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Images(Modality):
    """Pixels in [-1, 1]: (1 or 3, H, W)."""

    kind: ClassVar[str] = "images"

    def overview(self, samples: Tensor, stem: Path, *, columns: int, lengths: Tensor | None = None) -> list[Path]:
        """A grid as PNG."""
        return [save_grid(samples, add_suffix(stem, ".png"), columns=columns)]

    def save(self, sample: Tensor, stem: Path) -> Path:
        """A PNG."""
        return save_picture(to_image(unit_to_pixels(sample.cpu())), add_suffix(stem, ".png"))

    def arrays(self, samples: Tensor, lengths: Tensor | None = None) -> dict[str, np.ndarray]:
        """uint8 (N, H, W, C) under "arr_0": the layout of ADM's evaluation suite."""
        return {"arr_0": unit_to_pixels(samples.cpu()).permute(0, 2, 3, 1).contiguous().numpy()}


def save_grid(samples: Tensor, path: Path, *, columns: int, latent: bool = False) -> Path:
    """Writes samples (N, C, H, W) as one picture, row by row.

    Args:
        samples: in [-1, 1]. 1 channel is drawn grey, else the first three are red, green and blue.
        path: of the picture.
        columns: samples per row.
        latent: VAE latents: three channels, each stretched over its own range. Not what a decoder would show.
    """
    samples = samples.detach().float().cpu()
    if samples.shape[1] == 2:
        samples = samples[:, :1]
    samples = samples[:, :3]
    if latent:
        low, high = samples.amin((0, 2, 3), keepdim=True), samples.amax((0, 2, 3), keepdim=True)
        samples = (samples - low) / (high - low).clamp_min(1e-6) * 2 - 1
    return save_picture(to_image(tiled(enlarged(unit_to_pixels(samples)), columns, GAP)), path)
