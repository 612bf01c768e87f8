"""How films become samples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoConfig:
    """How films become samples."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
