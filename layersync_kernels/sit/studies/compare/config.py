"""Settings of a comparison."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ....errors import ConfigError, DataError
from ...config.run import StartingPoint, TrainConfig
from ...data.base import SampleSet
from ...data.registry import load_data
from ...evaluation.networks import I3D, INCEPTION
from ...evaluation.validation import hold_out

SETTINGS = "compare.json"
"""Name of the settings file in the folder of a comparison."""
METHODS = ("vanilla", "layersync", "repa", "both")
"""What is compared where --methods does not say it."""
KNOWN_METHODS = (*METHODS, "dispersive")
MOST_HELD_OUT = 1000
"""Held-out samples where --held-out does not say how many."""
_TEACHER = "efficientnet-lite0"


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, and how."""

    train: TrainConfig = field(default_factory=TrainConfig)
    methods: tuple[str, ...] = METHODS
    """vanilla (neither), layersync, repa, both; and dispersive. Which LayerSync, teacher and block, the flags of
    `layersync train` say; without --align it is REPA with efficientnet-lite0."""
    seeds: int = 3
    """Runs of each method: seeds --seed, --seed + 1 ..."""
    marks: int = 8
    """How often the quality is measured, evenly over --steps; runs take turns from mark to mark."""
    held_out: int | None = None
    """Samples kept from training for the validation loss; by default a tenth of them, at most 1000."""
    validation: Path | None = None
    """Take the held-out samples from this .npz or .safetensors file, and train on all of --data."""
    quality_network: str = "auto"
    """Network whose features the Fréchet distance compares, a name as --features of `layersync evaluate` has it; auto:
    its default for images, films, sounds or motion; none: no Fréchet distance."""
    samples: int = 1000
    """Samples drawn for a Fréchet distance, by the solver of the sampling flags."""
    reference: int = 5000
    """Training samples that they are compared with."""
    frechet_every: int = 4
    """Marks between two Fréchet distances; the last mark always has one."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        for method in self.methods:
            if method in KNOWN_METHODS:
                method_config(self.train, method).validate()
        low = {"seeds": 1, "marks": 1, "held_out": 1, "samples": 2, "reference": 2, "frechet_every": 1}
        for name, least in low.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
        if self.marks > self.train.optim.steps:
            raise ConfigError(f"--marks {self.marks}: there are only {self.train.optim.steps} steps")
        unknown = sorted(set(self.methods) - set(KNOWN_METHODS))
        if unknown or len(self.methods) < 2 or len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"--methods {' '.join(self.methods)}: expected two or more of {', '.join(KNOWN_METHODS)}")
        if self.train.layersync.layersync == ("off",) and set(self.methods) & {"layersync", "both"}:
            raise ConfigError("--layersync off leaves nothing to compare; leave it out, or choose other --methods")
        if self.train.dispersive.dispersive != "off" and "dispersive" not in self.methods:
            raise ConfigError("--dispersive is what the method dispersive trains with; name that in --methods")
        if (name := self.quality_network) in (INCEPTION, I3D):
            raise ConfigError(
                f"--quality-network {name} takes a file of weights, for which there is no flag here: take another, and "
                f"`layersync evaluate RUN --features {name} --features-weights FILE` for the runs of the comparison"
            )
        if self.validation is None and self.train.align.features is not None:
            raise ConfigError("--features are those of all samples, so none can be held out: give --validation FILE")


@dataclass(frozen=True)
class CompareCommand(StartingPoint):
    """Train vanilla, LayerSync, REPA and both (or others) from the same seeds; write report.md, .png and .json.

    Each run trains for --steps, or for --max-seconds of training where that is less. Runs of one seed take turns, so
    that a slow spell of the machine hits all methods alike. Stopped and called again, it goes on where it was.
    """

    comparison: CompareConfig = field(default_factory=CompareConfig)
    out: Path = Path("runs/compare")
    """Folder of the comparison; its runs are METHOD/seed-N in it, as `layersync train` makes them."""
    resume: bool = False
    """Take the settings of the comparison in --out, so that no flag has to be repeated."""
    overwrite: bool = False
    """Put the new comparison in the place of that in --out, which is deleted."""


def method_config(config: TrainConfig, method: str) -> TrainConfig:
    """`config` as `method` trains it. The time limit goes: `Comparison` sees to it; the rate follows steps."""
    replace = dataclasses.replace
    config = replace(config, optim=replace(config.optim, max_seconds=None))
    if method in ("vanilla", "repa", "dispersive"):
        config = replace(config, layersync=replace(config.layersync, layersync=("off",)))
    align = config.align
    if method in ("vanilla", "layersync", "dispersive"):
        align = replace(align, align="off", teacher=None, features=None)
    elif align.align == "off":
        align = replace(align, align="repa")
        if align.teacher is None and align.features is None:
            align = replace(align, teacher=_TEACHER)
    dispersive = config.dispersive
    if method != "dispersive":
        dispersive = replace(dispersive, dispersive="off")
    elif dispersive.dispersive == "off":
        dispersive = replace(dispersive, dispersive="auto")
    return replace(config, align=align, dispersive=dispersive)


def load_sets(config: CompareConfig, device: torch.device) -> tuple[SampleSet, SampleSet]:
    """What the runs are trained on, and what is held out.

    Raises:
        ConfigError: there is not enough to hold out.
        DataError: the data cannot be used, or differs from that of --validation.
    """
    data = load_data(config.train.data, device)
    if config.validation is None:
        tenth = min(MOST_HELD_OUT, max(2, len(data) // 10))
        return hold_out(data, tenth if config.held_out is None else config.held_out)
    held_out = load_data(dataclasses.replace(config.train.data, data=str(config.validation)), device)
    if held_out.spec != data.spec or held_out.num_classes > data.num_classes:
        raise DataError(
            f"--validation {config.validation} has samples of {held_out.spec} in {held_out.num_classes} classes; "
            f"--data has {data.spec} in {data.num_classes}"
        )
    return data, held_out
