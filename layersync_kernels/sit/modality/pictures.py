"""Pixels as pictures, sheets of pictures, and animations, in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..files import atomic_path

CELL = 56
"""Smaller samples are enlarged to about this many pixels, so that a digit of 14 pixels can be seen."""
GREY = 128
"""Between the samples of a sheet."""


def enlarged(pixels: Tensor) -> Tensor:
    """Pictures (..., H, W) with each pixel repeated, where they are less than half as wide as `CELL`."""
    factor = max(1, CELL // pixels.shape[-1])
    return pixels.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def tiled(pictures: Tensor, columns: int, gap: int) -> Tensor:
    """Pictures or films uint8 (N, ..., H, W) as one (..., H', W'), row by row on grey, `gap` pixels around each."""
    count, *inner, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = torch.full((*inner, rows * (height + gap) + gap, columns * (width + gap) + gap), GREY, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        sheet[..., top : top + height, left : left + width] = picture
    return sheet


def to_image(pixels: Tensor) -> Image.Image:
    """uint8 (1 or 3, H, W) for Pillow, grey or in colours."""
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy())


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Writes a PNG."""
    with atomic_path(path) as temporary:
        picture.save(temporary, "PNG")
    return path


def save_animation(pictures: Sequence[Image.Image], fps: float, path: Path) -> Path:
    """Writes a GIF without end, of at least one picture; it counts hundredths of a second, 2 at least."""
    first, *others = pictures
    duration = 10 * max(2, round(100 / fps))
    with atomic_path(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=others, duration=duration, loop=0, optimize=False)
    return path
