"""What a checkpoint's state.json has to hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..config.io import build
from ..data.base import SampleSet
from ..modality.audio import Sound
from ..modality.base import Modality
from ..modality.images import Images
from ..modality.latents import Latents
from ..modality.registry import build_modality, modality_facts
from ..spec import SampleSpec
from .local import STATE, read_state


@dataclass(frozen=True)
class DataFacts:
    """The data that a model was trained on.

    Attributes:
        shape: of a sample, (C, ...).
        num_classes: labels lie in [0, num_classes).
        class_names: one a class.
        variable: whether samples have lengths, up to the first size.
        modality: what samples stand for, as `modality_facts` gives it.
        lengths: typical ones of each class, or empty.
        text_width: channels of the words of texts; None: there are none.
        captions, text_encoder: see `SampleSet`.
        latent: what stood there before there were modalities: whether samples are latents of an autoencoder.
    """

    shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    variable: bool = False
    modality: dict[str, Any] | None = None
    lengths: tuple[tuple[int, ...], ...] = ()
    text_width: int | None = None
    captions: tuple[str, ...] = ()
    text_encoder: str | None = None
    latent: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) < 2:
            raise ValueError(f"shape is {self.shape}; expected channels and sizes")
        SampleSpec.of(self.shape)
        if not self.num_classes >= 1:
            raise ValueError(f"num_classes is {self.num_classes}; expected at least 1")
        if self.lengths and len(self.lengths) != self.num_classes:
            raise ValueError(f"lengths are those of {len(self.lengths)} classes; expected {self.num_classes}")
        if not all(1 <= length <= self.shape[1] for own in self.lengths for length in own):
            raise ValueError(f"lengths go beyond 1 to {self.shape[1]}")
        if len(self.what.mean) not in (0, self.shape[0]):
            raise ValueError(f"modality.mean has {len(self.what.mean)} values; expected {self.shape[0]}, one a channel")
        if isinstance(self.what, Sound) and self.what.channels != self.shape[0]:
            raise ValueError(f"modality has {self.what.channels} channels; expected {self.shape[0]}")

    @property
    def spec(self) -> SampleSpec:
        """The shape of a sample."""
        return SampleSpec.of(self.shape, variable=self.variable)

    @property
    def what(self) -> Modality:
        """What samples stand for."""
        if self.modality is None:
            return Latents() if self.latent else Images()
        return build_modality(self.modality)


def facts_of(data: SampleSet, num_classes: int) -> dict[str, Any]:
    """What `DataFacts` reads: of a data set, for a model of so many classes."""
    return {
        "shape": data.spec.shape,
        "variable": data.spec.variable,
        "num_classes": num_classes,
        "class_names": data.class_names,
        "modality": modality_facts(data.modality),
        "lengths": data.typical_lengths(),
        "text_width": data.text_width,
        "captions": data.captions,
        "text_encoder": data.text_encoder,
    }


@dataclass(frozen=True)
class ScalerState:
    """That of `torch.amp.GradScaler`."""

    scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    _growth_tracker: int

    def __post_init__(self) -> None:
        factors = (self.scale, self.growth_factor, self.backoff_factor, float(self.growth_interval))
        if not all(0 < value < math.inf for value in factors) or self._growth_tracker < 0:
            raise ValueError("its factors are no positive numbers")


@dataclass(frozen=True)
class RunState:
    """Counters of a run, and what they belong to.

    Attributes:
        step: optimiser steps done.
        samples_seen: position in the shuffled stream of samples.
        seconds: of training.
        data: what the model was trained on.
        scaler: `ScalerState` of fp16 gradients, or empty.
        run: what all files of the run's checkpoints are marked with; None before there was such a mark.
        meter: sum and count of each mean that the next record goes on with; empty before there were any.
    """

    step: int
    samples_seen: int
    seconds: float
    data: DataFacts
    scaler: dict[str, Any] = field(default_factory=dict)
    run: str | None = None
    meter: dict[str, tuple[float, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.step <= self.samples_seen:
            raise ValueError(f"step is {self.step} and samples_seen {self.samples_seen}; expected 0 <= step <= samples")
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds is {self.seconds}; expected a time")
        if not all(math.isfinite(total) and count >= 1 for total, count in self.meter.values()):
            raise ValueError("meter has no sums and counts")
        if self.scaler:
            build(ScalerState, self.scaler, "scaler.")


def read_run_state(checkpoint: Path) -> RunState:
    """The state of a checkpoint folder of the trainer.

    Raises:
        DamagedCheckpoint: as `read_state`.
        CheckpointError: it holds something else; names the file and the value.
    """
    values = read_state(checkpoint)
    try:
        return build(RunState, values)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint / STATE} is not what a run saves: {error}") from error
