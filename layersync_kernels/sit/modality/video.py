"""Films."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import optional_module
from ..files import add_suffix, atomic_path
from .base import Modality, check_fps
from .images import unit_to_pixels
from .pictures import GREY, enlarged, save_animation, save_picture, tiled, to_image

SHOWN = 8
"""Frames of a film in a contact sheet, at most."""
GAP, LINE = 4, 1
"""Pixels between films, and between the frames of one."""
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
        check_fps(self.fps)

    def overview(self, samples: Tensor, stem: Path, *, columns: int, lengths: Tensor | None = None) -> list[Path]:
        """A few frames of each as PNG, and all of them side by side as an animated GIF."""
        films = enlarged(unit_to_pixels(samples.detach().cpu()))
        sheet = save_picture(to_image(contact_sheet(films, columns)), add_suffix(stem, ".png"))
        frames = tiled(films, columns, GAP).transpose(0, 1)
        return [sheet, save_gif(frames, self.fps, add_suffix(stem, ".gif"))]

    def save(self, sample: Tensor, stem: Path) -> Path:
        """A film, as `container` says."""
        frames = unit_to_pixels(sample.detach().cpu()).transpose(0, 1)
        write = save_mp4 if self.container == "mp4" else save_gif
        return write(frames, self.fps, add_suffix(stem, f".{self.container}"))

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
    return tiled(strips, min(divisors, key=lambda n: abs(n - square)), GAP)


def save_gif(frames: Tensor, fps: float, path: Path) -> Path:
    """Writes uint8 frames (T, 1 or 3, H, W) as a GIF without end."""
    return save_animation([to_image(frame) for frame in frames], fps, path)


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
