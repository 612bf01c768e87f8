"""Latents of an autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..files import add_suffix, atomic_path
from .audio import Waveform
from .autoencoder import is_local, local_autoencoder
from .base import Modality, check_fps
from .images import Images, save_grid
from .video import Video


@dataclass(frozen=True, kw_only=True)
class Latents(Modality):
    """Latents of an autoencoder, (C, H, W) or of other extents; decoded to be seen where that autoencoder is a folder.

    Attributes:
        of: the modality that they are latents of, where that is known.
        autoencoder: its name; empty: not known.
        sample_rate: of sounds.
        fps: of films.
    """

    kind: ClassVar[str] = "latents"
    of: str = "images"
    autoencoder: str = ""
    sample_rate: int = 44_100
    fps: float = 10.0

    def __post_init__(self) -> None:
        check_fps(self.fps)

    def decoded(self, samples: Tensor) -> tuple[Modality, Tensor] | None:
        """Samples of the data, and their modality; None where there is no autoencoder here."""
        if not self.autoencoder or not is_local(self.autoencoder):
            return None
        network = local_autoencoder(self.autoencoder)
        values = torch.cat([network.decode(own) for own in self.restore(samples.float().cpu()).split(8)])
        if self.of == "waveform":
            return Waveform(sample_rate=self.sample_rate), values.mean(1, keepdim=True)
        if self.of == "video":
            return Video(fps=self.fps), values
        return Images(), values

    def overview(self, samples: Tensor, stem: Path, *, columns: int, lengths: Tensor | None = None) -> list[Path]:
        """That of the decoded samples. Without an autoencoder a grid of the first three channels, which is not what it
        would show: of films those of the middle frame; of sequences all channels over time, in grey.
        """
        if (decoded := self.decoded(samples)) is not None:
            modality, values = decoded
            if lengths is not None:
                lengths = (lengths.cpu() * values.shape[2] / samples.shape[2]).round().long()
            return modality.overview(values, stem, columns=columns, lengths=lengths)
        if samples.ndim == 3:
            samples = samples[:, None]
        elif samples.ndim == 5:
            samples = samples[:, :, samples.shape[2] // 2]
        return [save_grid(samples, add_suffix(stem, ".png"), columns=columns, latent=True)]

    def save(self, sample: Tensor, stem: Path) -> Path:
        """As the decoded sample; without an autoencoder as .npy."""
        if (decoded := self.decoded(sample[None])) is not None:
            modality, values = decoded
            return modality.save(values[0], stem)
        path = add_suffix(stem, ".npy")
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, self.restore(sample[None].float().cpu())[0].numpy())
        return path
