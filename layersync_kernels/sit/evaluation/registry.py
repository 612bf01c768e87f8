"""Networks that see samples, by name and kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from ...errors import ConfigError
from ...runtime.cache import cache_folder
from ..config.data import DataConfig
from ..data.base import SampleSet
from ..modality.audio import Sound
from ..modality.base import Modality
from ..teachers.grids import SPEECH
from .motion_classifier import CLASSIFIER, MotionNetwork
from .networks import (
    CLAP,
    I3D,
    INCEPTION,
    ClapFeatures,
    FilmClassifier,
    FilmNetwork,
    ImageNetwork,
    InceptionNetwork,
    Network,
    SpeechFeatures,
)

DEFAULTS = {"images": "efficientnet-lite0", "video": "efficientnet-lite0", "audio": SPEECH, "motion": CLASSIFIER}
"""By kind, the one that needs no download."""
_FILM_SIZE = 64
"""Side of the frames of films for efficientnet-lite0."""


def kept_in() -> Path:
    """Where networks that are trained here, and what they see of real samples, are kept by default."""
    return cache_folder() / "evaluate"


def load_network(
    name: str | None,
    kind: str,
    device: torch.device,
    *,
    splits: Callable[[], tuple[SampleSet, SampleSet]],
    folder: Path,
    weights: Path | None = None,
    size: int | None = None,
) -> Network:
    """The network of that name.

    Args:
        name: as --features has it; None: that of `DEFAULTS`.
        kind: of the samples, see `kind_of`.
        device: where it runs.
        splits: real samples to train a network of motion on, and others for its accuracy; called for motion alone.
        folder: where that is kept.
        weights: a file of its weights; None: its own.
        size: side of the images that it gets; None: its own, and 64 of films.

    Raises:
        ConfigError: no such network of that kind, or it needs what is not given.
        TeacherError, CheckpointError: see the networks.
    """
    if kind not in DEFAULTS:
        raise ConfigError(f"no network looks at {kind}; there are some of {', '.join(DEFAULTS)}")
    name = name or DEFAULTS[kind]
    if kind == "images":
        if name == INCEPTION:
            return InceptionNetwork(device, weights)
        return ImageNetwork(name, device, size=size, weights=weights)
    if kind == "video":
        if name == I3D:
            return FilmClassifier(device, weights)
        size = _FILM_SIZE if size is None and name == DEFAULTS[kind] else size
        return FilmNetwork(ImageNetwork(name, device, size=size, weights=weights))
    if kind == "audio" and name == CLAP:
        return ClapFeatures(device, weights)
    if name != DEFAULTS[kind]:
        known = f"{DEFAULTS[kind]} or {CLAP}" if kind == "audio" else DEFAULTS[kind]
        raise ConfigError(f"--features {name}: no such network of {kind}; expected {known}")
    return SpeechFeatures(device) if kind == "audio" else MotionNetwork(*splits(), folder)


def as_recorded(config: DataConfig, modality: Modality) -> DataConfig | None:
    """How to read sounds as they are; None where `config` does so, or where there are none."""
    if not isinstance(modality, Sound) or config.audio.sound == "waveform":
        return None
    return dataclasses.replace(config, audio=dataclasses.replace(config.audio, sound="waveform"))
