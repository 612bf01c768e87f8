"""Films."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..extras import optional_module
from ..files import atomic_path
from .base import Modality
from .images import GRID_CELL, save_picture, unit_to_pixels

SHOWN = 8
"""Frames of a film in a contact sheet, at most."""
GAP, LINE, GREY = 4, 1, 128
EXTRA = "layersync_kernels[video]"
"""What brings PyAV."""


@dataclass(frozen=True, kw_only=True)
class Video(Modality):
    """Films in [-1, 1]: (1 or 3, T, H, W).

    Attributes:
        fps: frames a second.
        container: of single films in files. GIF keeps grey films as they are and has 256 colours for others; mp4 is
            lossy, and takes PyAV.
    """

    kind: ClassVar[str] = "video"
    fps: float
    container: Literal["gif", "mp4"] = "gif"

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps is {self.fps}; expected a number of frames a second")

    def overview(self, samples: Tensor, stem: Path, *, columns: int, lengths: Tensor | None = None) -> list[Path]:
        """A few frames of each as PNG, and all of them side by side as an animated GIF."""
        films = unit_to_pixels(samples.detach().cpu())
        factor = max(1, GRID_CELL // films.shape[-1])
        films = films.repeat_interleave(factor, 3).repeat_interleave(factor, 4)
        sheet = save_picture(contact_sheet(films, columns), stem.with_name(f"{stem.name}.png"))
        frames = torch.stack([_tiled(frame, columns) for frame in films.unbind(2)])
        return [sheet, save_gif(frames, self.fps, stem.with_name(f"{stem.name}.gif"))]

    def save(self, sample: Tensor, stem: Path) -> Path:
        """A film, as `container` says."""
        frames = unit_to_pixels(sample.detach().cpu()).transpose(0, 1)
        write = save_mp4 if self.container == "mp4" else save_gif
        return write(frames, self.fps, stem.with_name(f"{stem.name}.{self.container}"))

    def arrays(self, samples: Tensor, lengths: Tensor | None = None) -> dict[str, np.ndarray]:
        """uint8 (N, T, H, W, C) under "videos", which can be trained on again, and frames a second under "fps"."""
        videos = unit_to_pixels(samples.detach().cpu()).permute(0, 2, 3, 4, 1).contiguous().numpy()
        return {"videos": videos, "fps": np.asarray(self.fps, np.float32)}


def contact_sheet(films: Tensor, columns: int) -> Tensor:
    """Moments of films (N, C, T, H, W) in one picture (C, ...), each film a strip from left to right.

    Strips stand side by side, so many that rows of `columns` films are kept and the picture is no long band.
    """
    count, _, frames, height, width = films.shape
    shown = min(frames, SHOWN)
    moments = (torch.arange(shown) * (frames - 1) / max(shown - 1, 1)).round().long()
    # A line between frames: digits before black would run into each other.
    strips = F.pad(films[:, :, moments], (0, LINE), value=GREY // 2).permute(0, 1, 3, 2, 4).flatten(3)[..., :-LINE]
    divisors = [n for n in range(1, columns + 1) if columns % n == 0]
    square = (count * height / (shown * width)) ** 0.5
    return _tiled(strips, min(divisors, key=lambda n: abs(n - square)))


def _tiled(pictures: Tensor, columns: int) -> Tensor:
    """Pictures uint8 (N, C, H, W) as one (C, ...), row by row on grey."""
    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = torch.full((channels, rows * (height + GAP) + GAP, columns * (width + GAP) + GAP), GREY, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + GAP) + GAP, (i % columns) * (width + GAP) + GAP
        sheet[:, top : top + height, left : left + width] = picture
    return sheet


def save_gif(frames: Tensor, fps: float, path: Path) -> Path:
    """Writes uint8 frames (T, 1 or 3, H, W) as an endless animation; GIF counts hundredths of a second, 2 at least."""
    pictures = [_picture(frame) for frame in frames]
    duration = 10 * max(2, round(100 / fps))
    with atomic_path(path) as temporary:
        pictures[0].save(
            temporary, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0, optimize=False
        )
    return path


def save_mp4(frames: Tensor, fps: float, path: Path) -> Path:
    """Writes uint8 frames (T, 1 or 3, H, W) as H.264, the last row and column repeated where their number is odd.

    Raises:
        ConfigError: PyAV is not installed.
    """
    av = optional_module("av", "--video-format mp4", EXTRA)
    array = frames.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    array = np.pad(array, [(0, 0), *((0, size % 2) for size in array.shape[1:3]), (0, 0)], mode="edge")
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = array.shape[1], array.shape[2], "yuv420p"
        stream.options = {"crf": "18"}
        for picture in array:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def _picture(frame: Tensor) -> Image.Image:
    array = frame[0].numpy() if len(frame) == 1 else frame.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)
