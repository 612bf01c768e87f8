"""From images to tensors in [-1, 1] and back."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...errors import DataError

logger = logging.getLogger(__name__)

CHUNK_VALUES = 2**24
"""Values that are made floats at a time where a whole data set is converted: 64 MB in fp32."""


def chunk_length(shape: Sequence[int]) -> int:
    """How many samples of a set (N, ...) are converted at a time."""
    return max(1, CHUNK_VALUES // math.prod(shape[1:]))


def crop_to(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The largest centred part of (..., H, W) with the proportions of `size`."""
    height, width = images.shape[-2:]
    tall, wide = min(height, max(1, width * size[0] // size[1])), min(width, max(1, height * size[1] // size[0]))
    top, left = (height - tall) // 2, (width - wide) // 2
    return images[..., top : top + tall, left : left + wide]


def resize_pixels(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (N, C, H, W) to (N, C, *size): a centred part, then exact averages for whole factors, else anti-aliased
    bicubic interpolation.
    """
    images = crop_to(images, size)
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    resized = []
    for chunk in images.split(chunk_length(images.shape)):
        chunk = chunk.float()
        if height % size[0] == 0 and width % size[1] == 0:
            chunk = F.avg_pool2d(chunk, (height // size[0], width // size[1]))
        else:
            chunk = F.interpolate(chunk, size, mode="bicubic", antialias=True)
        resized.append(chunk.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(resized)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Pixels of any shape as uint8.

    Raises:
        DataError: they are neither uint8, nor floats in [-1, 1] or [0, 1].
    """
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"images are {images.dtype}; expected uint8 (0..255) or floats in [-1, 1] or [0, 1]")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1.0 and high <= 1.0):  # NaN fails this too
        raise DataError(f"float images range over [{low:g}, {high:g}]; expected [-1, 1] or [0, 1]")
    logger.info(
        "float images without negative values are read as [0, 1]" if low >= 0 else "float images read as [-1, 1]"
    )
    pixels = np.empty(images.shape, np.uint8)
    length = chunk_length(images.shape)
    for start in range(0, len(images), length):
        part = images[start : start + length]
        unit = part if low >= 0 else (part + 1.0) / 2.0
        pixels[start : start + length] = np.rint(unit * 255.0)
    return pixels


def to_channels(pixels: Tensor, channels: int) -> Tensor:
    """uint8 (N, 1 or 3, ...) in grey or colour: by Rec. 601 luma, as Pillow converts RGB to L."""
    if (channels, pixels.shape[1]) == (1, 3):
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, *[1] * (pixels.ndim - 2))
        parts = pixels.split(chunk_length(pixels.shape))
        return torch.cat([(part * weights).sum(1, keepdim=True).round().to(torch.uint8) for part in parts])
    return pixels.expand(-1, channels, *[-1] * (pixels.ndim - 2))


def image_to_tensor(image: Image.Image, size: tuple[int, int], channels: int) -> Tensor:
    """A PIL image to uint8 (channels, *size). 16-bit grey keeps its upper byte.

    Raises:
        ValueError: 32-bit and floating-point images, whose range is unknown.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} is not supported; expected 8-bit or 16-bit images")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    array = np.array(image, dtype=np.uint8).reshape(image.height, image.width, channels)
    return resize_pixels(torch.from_numpy(array).permute(2, 0, 1)[None], size)[0].contiguous()
