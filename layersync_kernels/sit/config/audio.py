"""How sounds become samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import at_least, positive, require


@dataclass(frozen=True)
class AudioConfig:
    """How sounds become samples: mono, at one rate."""

    sound: Literal["mel", "waveform"] = "mel"
    """mel: log-mel spectrograms, a channel for each band, which Griffin-Lim makes sound again; waveform: as it is."""
    sample_rate: int | None = None
    """Samples a second; None: those of the first file. Others are resampled."""
    clip_seconds: float = 1.0
    """Longest clip; what is shorter keeps its length."""
    clips_per_sound: int = 1
    """Clips taken from a sound, one after the other as far as it goes; 0: all of it."""
    fixed_length: bool = False
    """Fill short clips up with silence instead, so that all are equally long."""
    mel_bins: int = 80
    """Bands of a spectrogram."""
    window_ms: float = 64.0
    """Length of its window in milliseconds."""
    hop_ms: float = 16.0
    """Time from one window to the next in milliseconds."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        at_least(1, sample_rate=self.sample_rate, mel_bins=self.mel_bins)
        at_least(0, clips_per_sound=self.clips_per_sound)
        positive(clip_seconds=self.clip_seconds, window_ms=self.window_ms, hop_ms=self.hop_ms)
        require(self.hop_ms <= self.window_ms, f"--hop-ms {self.hop_ms}: expected at most --window-ms {self.window_ms}")
