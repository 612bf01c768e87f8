"""Sounds: log-mel spectrograms, and waveforms."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..batch import within_lengths
from ..extras import optional_module
from ..files import add_suffix, atomic_path
from .base import Modality, cut
from .images import save_grid

INSTALL = "layersync_kernels[audio]"
FLOOR = 1e-5
"""Amplitudes below are silence: log-mel spectrograms are log(max(amplitude, FLOOR))."""
GAP = 0.25
"""Seconds of silence between samples that are joined in one file."""
ITERATIONS = 32
"""Of Griffin-Lim."""
SAVED_PEAK = 0.99
"""A sound that is louder than a file can hold is made that loud."""
MAX_BANDS, MAX_WINDOW = 1024, 2**16
"""Filters of a spectrogram take memory by these, which a file of a checkpoint sets."""


@dataclass(frozen=True, kw_only=True)
class Sound(Modality):
    """Mono sounds.

    Attributes:
        sample_rate: samples a second.
    """

    sample_rate: int
    silence: ClassVar[float] = 0.0
    """What values are where there is no sound."""

    def __post_init__(self) -> None:
        if self.sample_rate < 1:
            raise ValueError(f"sample_rate is {self.sample_rate}; expected at least 1")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, self.channels) or not all(map(math.isfinite, values)):
                raise ValueError(f"{name} has {len(values)} values; expected {self.channels}, all finite")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std goes down to {min(self.std):g}; expected more than 0")

    @property
    @abstractmethod
    def channels(self) -> int:
        """C."""

    @abstractmethod
    def encode(self, waveform: Tensor) -> Tensor:
        """A waveform float32 (L,) to values (C, T)."""

    @abstractmethod
    def waveform(self, values: Tensor) -> np.ndarray:
        """Values (C, T) to float32 (L,)."""

    @abstractmethod
    def picture(self, values: Tensor) -> Tensor:
        """Values (C, T) to grey in [-1, 1] (1, bands, T'), low frequencies at the bottom."""

    def sounds(self, samples: Tensor, lengths: Tensor | None = None) -> list[np.ndarray]:
        """Waveforms float32 (L,) of samples (N, C, T), each cut to its length."""
        return [self.waveform(self._values(own[None])[0]) for own in cut(samples, lengths)]

    def _values(self, samples: Tensor) -> Tensor:
        """Restored, on the CPU; what is not finite is silence."""
        values = self.restore(samples.float().cpu())
        return torch.where(values.isfinite(), values, self.silence)

    def overview(self, samples: Tensor, stem: Path, *, columns: int, lengths: Tensor | None = None) -> list[Path]:
        """Spectrograms as PNG, and all sounds in one wav, row by row with gaps between them."""
        values = self._values(samples)
        if lengths is not None:
            values = torch.where(within_lengths(lengths.cpu(), values), values, self.silence)
        pictures = torch.stack([self.picture(own) for own in values])
        shown = save_grid(pictures, add_suffix(stem, ".png"), columns=columns)
        gap = np.zeros(round(GAP * self.sample_rate), np.float32)
        joined = np.concatenate([part for sound in self.sounds(samples, lengths) for part in (sound, gap)])
        return [shown, save_wav(joined, self.sample_rate, add_suffix(stem, ".wav"))]

    def save(self, sample: Tensor, stem: Path) -> Path:
        """A wav of 16 bits."""
        return save_wav(self.sounds(sample[None])[0], self.sample_rate, add_suffix(stem, ".wav"))

    def arrays(self, samples: Tensor, lengths: Tensor | None = None) -> dict[str, np.ndarray]:
        """Waveforms float32 (N, L), zeros beyond ends; their lengths; and "sample_rate"."""
        sounds = self.sounds(samples, lengths)
        ends = np.array([len(sound) for sound in sounds])
        waveforms = np.zeros((len(sounds), int(ends.max())), np.float32)
        for row, sound in zip(waveforms, sounds, strict=True):
            row[: len(sound)] = sound
        return {"waveforms": waveforms, "lengths": ends, "sample_rate": np.array(self.sample_rate)}


@dataclass(frozen=True, kw_only=True)
class Mel(Sound):
    """Log-mel spectrograms (bands, frames): log of the amplitudes in mel bands, which Griffin-Lim makes sound again.

    Attributes:
        window: of the Fourier transform, in samples.
        hop: from one window to the next.
        bands: mel bands (Slaney's, as librosa has them) from 0 to half of the rate.
    """

    kind: ClassVar[str] = "mel"
    silence: ClassVar[float] = float(np.log(FLOOR))
    window: int
    hop: int
    bands: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.hop <= self.window or not 2 <= self.window <= MAX_WINDOW:
            raise ValueError(f"window {self.window}, hop {self.hop}: expected 1 <= hop <= window <= {MAX_WINDOW}")
        if not 1 <= self.bands <= MAX_BANDS:
            raise ValueError(f"bands is {self.bands}; expected 1 to {MAX_BANDS}")

    @property
    def channels(self) -> int:
        """As many as bands."""
        return self.bands

    def encode(self, waveform: Tensor) -> Tensor:
        """A waveform (L,) to (bands, frames): a frame for each hop that has begun."""
        missing = max(0, self.window // 2 + 1 - len(waveform))  # what reflection at the ends needs
        padded = torch.nn.functional.pad(waveform, (0, missing))
        spectrum = torch.stft(
            padded, self.window, self.hop, window=torch.hann_window(self.window), center=True, return_complex=True
        )
        mel = torch.from_numpy(_filters(self.sample_rate, self.window, self.bands)) @ spectrum.abs()
        return mel[:, : max(1, -(-len(waveform) // self.hop))].clamp_min(FLOOR).log()

    def waveform(self, values: Tensor) -> np.ndarray:
        """By the filters' pseudo-inverse, then Griffin-Lim."""
        librosa = _librosa()
        mel = values.clamp(self.silence, 10.0).exp().numpy()
        amplitudes = np.maximum(_inverse(self.sample_rate, self.window, self.bands) @ mel, 0.0)
        if amplitudes.shape[1] < 2:  # too short for a phase
            return np.zeros(self.hop, np.float32)
        sound = librosa.griffinlim(
            amplitudes, n_iter=ITERATIONS, hop_length=self.hop, n_fft=self.window, random_state=0
        )
        return np.nan_to_num(sound).astype(np.float32)

    def picture(self, values: Tensor) -> Tensor:
        """From silence to the loudest."""
        low, high = self.silence, max(float(values.max()), self.silence + 1)
        return ((values - low) / (high - low) * 2 - 1).flip(0)[None]


@dataclass(frozen=True, kw_only=True)
class Waveform(Sound):
    """Waveforms (1, samples) in [-1, 1]."""

    kind: ClassVar[str] = "waveform"

    @property
    def channels(self) -> int:
        """1."""
        return 1

    def encode(self, waveform: Tensor) -> Tensor:
        """As it is, with a channel."""
        return waveform[None]

    def waveform(self, values: Tensor) -> np.ndarray:
        """As it is."""
        return values[0].numpy().astype(np.float32)

    def picture(self, values: Tensor) -> Tensor:
        """Its spectrogram."""
        window = 256
        padded = torch.nn.functional.pad(values[0], (0, max(0, window // 2 + 1 - values.shape[1])))
        spectrum = torch.stft(
            padded, window, max(1, window // 4), window=torch.hann_window(window), return_complex=True
        )
        loud = spectrum.abs().clamp_min(1e-4).log()
        return ((loud - loud.min()) / (loud.max() - loud.min()).clamp_min(1e-6) * 2 - 1).flip(0)[None]


def save_wav(sound: np.ndarray, sample_rate: int, path: Path) -> Path:
    """Writes float32 (L,) as wav of 16 bits, softer where it would be clipped."""
    peak = float(np.abs(sound).max()) if len(sound) else 0.0
    if peak > SAVED_PEAK:
        sound = sound * (SAVED_PEAK / peak)
    soundfile = optional_module("soundfile", "writing sounds", INSTALL)
    with atomic_path(path) as temporary:
        soundfile.write(temporary, sound, sample_rate, format="WAV", subtype="PCM_16")
    return path


def _librosa() -> Any:
    return optional_module("librosa", "log-mel spectrograms", INSTALL)


@functools.cache
def _filters(sample_rate: int, window: int, bands: int) -> np.ndarray:
    """(bands, window / 2 + 1), float32."""
    filters: np.ndarray = _librosa().filters.mel(sr=sample_rate, n_fft=window, n_mels=bands)
    return filters.astype(np.float32)


@functools.cache
def _inverse(sample_rate: int, window: int, bands: int) -> np.ndarray:
    """The filters' pseudo-inverse, (window / 2 + 1, bands), float32."""
    return np.linalg.pinv(_filters(sample_rate, window, bands))


def resampled(waveform: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A mono sound (L,) at another rate."""
    if rate == wanted:
        return waveform
    sound: np.ndarray = _librosa().resample(waveform, orig_sr=rate, target_sr=wanted, res_type="soxr_hq")
    return sound.astype(np.float32)
