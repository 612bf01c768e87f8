"""From images to tensors in [-1, 1] and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

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
