"""Grids of samples as pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data.pixels import unit_to_pixels
from ..files import atomic_path

GRID_CELL = 56
"""Smaller samples are enlarged to about this many pixels, so that a digit of 14 pixels can be seen."""


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
    pixels = unit_to_pixels(samples)
    factor = max(1, GRID_CELL // pixels.shape[-1])
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    count, channels, height, width = pixels.shape
    rows, gap = -(-count // columns), 2
    grid = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 128, dtype=torch.uint8)
    for i, picture in enumerate(pixels):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        grid[:, top : top + height, left : left + width] = picture
    array = grid[0].numpy() if channels == 1 else grid.permute(1, 2, 0).contiguous().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")
    return path
