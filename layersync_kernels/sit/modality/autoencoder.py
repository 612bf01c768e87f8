"""Autoencoders of diffusers, between samples and latents."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, first_line
from ..extras import optional_module

KINDS = {
    "AutoencoderKL": "images",
    "AutoencoderOobleck": "waveform",
    "AutoencoderKLWan": "video",
    "AutoencoderKLCogVideoX": "video",
}
"""Class of diffusers to the modality that it encodes."""
INSTALL = "layersync_kernels[latents]"


class Autoencoder:
    """An autoencoder of diffusers, in evaluation mode.

    Args:
        name: a folder that `save_pretrained` wrote, or one with such in ``vae/``; else a name of the hub.
        device: where it computes.

    Attributes:
        name: as given.
        of: the modality that it encodes.
        shift, scale: per channel: a model's latents are (latents - shift) * scale.
        sample_rate: of an autoencoder of sounds.

    Raises:
        ConfigError: diffusers is not installed, it cannot be loaded, or is of a class that is not known.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        diffusers = optional_module("diffusers", f"the autoencoder {name}", INSTALL)
        options: dict[str, Any] = {}
        if not (Path(name) / "config.json").is_file() and (Path(name) / "vae" / "config.json").is_file():
            options["subfolder"] = "vae"
        try:
            config = diffusers.AutoencoderKL.load_config(name, **options)
            kind = str(config.get("_class_name"))
            if kind not in KINDS:
                raise ConfigError(f"the autoencoder {name} is a {kind}; expected one of {', '.join(KINDS)}")
            network = getattr(diffusers, kind).from_pretrained(name, **options)
        except ConfigError:
            raise
        except Exception as error:  # a hub, files and a package of many parts raise anything
            raise ConfigError(f"cannot load the autoencoder {name}: {first_line(error)}") from error
        self.name, self.of = name, KINDS[kind]
        self.network = network.to(device).eval().requires_grad_(False)
        own = self.network.config
        mean, std = own.get("latents_mean"), own.get("latents_std")
        factor = own.get("scaling_factor") or 1.0
        channels = len(mean) if mean else 1
        self.shift = torch.tensor(mean if mean else [own.get("shift_factor") or 0.0] * channels)
        self.scale = 1 / torch.tensor(std) if std else torch.full((channels,), float(factor))
        self.sample_rate: int | None = own.get("sampling_rate") if self.of == "waveform" else None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.network.parameters()).device

    @torch.no_grad()
    def encode(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, c, ...) of the posterior of samples (B, C, ...) in [-1, 1].

        One channel is repeated where the network wants several.

        Raises:
            ConfigError: it cannot take samples of this size.
        """
        own = self.network.config
        wanted = own.get("in_channels") or own.get("audio_channels") or samples.shape[1]
        if samples.shape[1] == 1 and wanted > 1:
            samples = samples.expand(-1, wanted, *samples.shape[2:])
        try:
            posterior = self.network.encode(samples.to(self.device)).latent_dist
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the autoencoder {self.name} cannot take {tuple(samples.shape[1:])}: {first_line(error)}"
            ) from error
        return posterior.mean, posterior.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Samples (B, C, ...) in [-1, 1] of latents as the network made them."""
        decoded: Tensor = self.network.decode(latents.to(self.device)).sample
        return decoded.float().cpu()


def is_at_hand(name: str) -> bool:
    """Whether an autoencoder of that name is a folder here, or was loaded already."""
    return name in _kept or any((Path(name) / part).is_file() for part in ("config.json", "vae/config.json"))


def can_decode() -> bool:
    """Whether the package is there that runs autoencoders."""
    return importlib.util.find_spec("diffusers") is not None


def load_autoencoder(name: str) -> Autoencoder:
    """That in a folder, or of the hub, on the CPU; kept until another one is asked for. Raises as `Autoencoder`."""
    if name not in _kept:
        network = Autoencoder(name, torch.device("cpu"))
        _kept.clear()
        _kept[name] = network
    return _kept[name]


_kept: dict[str, Autoencoder] = {}
