"""How human motion becomes samples."""

from __future__ import annotations

from dataclasses import dataclass

from . import at_least, positive


@dataclass(frozen=True)
class MotionConfig:
    """How human motion becomes samples."""

    motion_frames: int = 64
    """Frames of a sample; what is longer is cut into windows, what is shorter keeps its length."""
    motion_stride: int | None = None
    """Frames from the start of a window to that of the next; None: half a window."""
    motion_fps: float | None = 30.0
    """Frames a second: of faster recordings frames are left out. None, and slower ones: as recorded."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        at_least(1, motion_frames=self.motion_frames, motion_stride=self.motion_stride)
        positive(motion_fps=self.motion_fps)
