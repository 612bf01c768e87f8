"""How films become samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import at_least, positive, require

MAX_FPS = 1000
"""Frames a second; nobody records faster."""


@dataclass(frozen=True)
class VideoConfig:
    """How films become samples."""

    frames: int = 16
    """Frames of a sample."""
    frame_stride: int = 1
    """Take every n-th frame, after --video-fps."""
    video_fps: float | None = None
    """Frames a second: of faster films frames are left out, of slower ones repeated. None: as filmed. Of sets that are
    made here: 8."""
    video_size: tuple[int, int] | None = None
    """Height and width: films are scaled to cover it, and cut to its middle. None: as filmed; of sets that are made
    here: 32 32 and 32 64."""
    clips_per_file: int | None = None
    """Samples of a file, spread evenly over it. None: one after the other, as many as there are."""
    moving_digits: Literal[1, 2] = 1
    """Digits in a clip of moving-mnist: one, which is its class, or two, whose pair is."""
    made_clips: int | None = None
    """How many clips moving-mnist and bodies have. None: 10,000 and 2,000."""
    video_format: Literal["gif", "mp4"] = "gif"
    """Of single samples in files."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        at_least(
            1,
            frames=self.frames,
            frame_stride=self.frame_stride,
            clips_per_file=self.clips_per_file,
            made_clips=self.made_clips,
        )
        at_least(1, video_size=None if self.video_size is None else min(self.video_size))
        positive(video_fps=self.video_fps)
        require(
            self.video_fps is None or self.video_fps <= MAX_FPS,
            f"--video-fps {self.video_fps}: expected at most {MAX_FPS}",
        )
