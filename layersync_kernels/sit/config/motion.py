"""How human motion becomes samples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MotionConfig:
    """How human motion becomes samples."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
