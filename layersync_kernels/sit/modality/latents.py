"""Latents of an autoencoder."""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..files import add_suffix, atomic_path
from .audio import Waveform
from .autoencoder import INSTALL, can_decode, is_at_hand, load_autoencoder
from .base import Modality, check_fps
from .images import Images, save_grid
from .video import Video

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Latents(Modality):
    """Latents of an autoencoder, (C, H, W) or of other extents; decoded to be seen where that autoencoder is a folder.

    Attributes:
        of: the modality that they are latents of, where that is known.
        autoencoder: its name; empty: not known.
        sample_rate: of sounds.
        fps: of films.
        container: of single films, see `Video`.
    """

    kind: ClassVar[str] = "latents"
    of: str = "images"
    autoencoder: str = ""
    sample_rate: int = 44_100
    fps: float = 10.0
    container: Literal["gif", "mp4"] = "gif"

    def __post_init__(self) -> None:
        check_fps(self.fps)

    def decoded_by(self, name: str) -> Latents:
        """These, of the autoencoder of that name: a folder, or one of the hub, which is loaded.

        Where no normalisation is known, latents are taken to be scaled as the autoencoder's own models have them.

        Raises:
            ConfigError: as `Autoencoder`.
        """
        network = load_autoencoder(name)
        own = dataclasses.replace(self, autoencoder=name, of=network.of)
        if network.sample_rate is not None:
            own = dataclasses.replace(own, sample_rate=network.sample_rate)
        if self.mean or self.std:
            return own
        return dataclasses.replace(own, mean=tuple(network.shift.tolist()), std=tuple((1 / network.scale).tolist()))

    def decoded(self, samples: Tensor) -> tuple[Modality, Tensor] | None:
        """Samples of the data, and their modality; None, and a warning, where there is no autoencoder here."""
        if not (self.autoencoder and is_at_hand(self.autoencoder) and can_decode()):
            _say_what_is_drawn(self.autoencoder)
            return None
        network = load_autoencoder(self.autoencoder)
        values = torch.cat([network.decode(own) for own in self.restore(samples.float().cpu()).split(8)])
        if self.of == "waveform":
            return Waveform(sample_rate=self.sample_rate), values.mean(1, keepdim=True)
        if self.of == "video":
            return Video(fps=self.fps, container=self.container), values
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


@functools.cache  # once, and not at every picture of a training
def _say_what_is_drawn(autoencoder: str) -> None:
    if not autoencoder:
        missing = "what they are latents of is not known"
    elif not is_at_hand(autoencoder):
        missing = f"{autoencoder} is no folder here"
    else:
        missing = f"diffusers is not installed (pip install '{INSTALL}')"
    logger.warning(
        "what is drawn are the latents themselves, three channels as red, green and blue, and not what they decode to: "
        "%s. To see that: layersync sample RUN --vae FOLDER, or a name of the hub",
        missing,
    )
