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
from ...evaluation.networks import CLAP, I3D, INCEPTION
from ...evaluation.validation import hold_out
from ..pair.config import MIN_SAMPLES
from .arms import METHODS, Arm, arms, unused

SETTINGS = "compare.json"
"""Name of the settings file in the folder of a comparison."""
QUALITIES = {"validation_loss": "validation loss", "frechet": "Fréchet distance"}
"""Key of a measurement to its name; less is better in each."""
MOST_HELD_OUT = 1000
"""Held-out samples where --held-out does not say how many."""


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, and how."""

    train: TrainConfig = field(default_factory=TrainConfig)
    methods: tuple[str, ...] = METHODS
    """vanilla (neither), layersync, repa, both; and irepa, sra, dispersive. Which LayerSync, teacher and block, the
    flags of `layersync train` say; without --teacher it is efficientnet-lite0. For several of one method: "NAME=METHOD
    FLAGS" with flags of the losses, as in "near=layersync --layersync 1:4 --weight 0.5"."""
    seeds: int = 3
    """Runs of each method: seeds --seed, --seed + 1 ..."""
    marks: int = 8
    """How often the quality is measured, evenly over --steps; runs take turns from mark to mark."""
    held_out: int | None = None
    """Samples kept from training for the validation loss; by default a tenth of them, at most 1000."""
    validation: Path | None = None
    """Take the held-out samples from this .npz or .safetensors file, and train on all of --data."""
    validation_split: bool = False
    """Take the held-out samples from the test split of --data, of which --split train is trained on."""
    quality_network: str = "auto"
    """Network whose features the Fréchet distance compares, a name as --features of `layersync evaluate` has it; auto:
    its default for images, films, sounds or motion; none: no Fréchet distance."""
    samples: int = 1000
    """Samples drawn for a Fréchet distance, by the solver of the sampling flags."""
    reference: int = 5000
    """Training samples that they are compared with."""
    frechet_every: int = 4
    """Marks between two Fréchet distances; the last mark always has one."""
    probe_samples: int = 400
    """Held-out samples by which `layersync probe` looks at each block, before and after training; 0: it does not."""
    pilot: float = 0.1
    """Share of --steps that two more seeds of the first two methods train before, to tell how many seeds an effect
    would take; 0: none do."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        low = {"seeds": 1, "marks": 1, "held_out": 1, "samples": 2, "reference": 2, "frechet_every": 1}
        low["probe_samples"] = MIN_SAMPLES if self.probe_samples else 0
        for name, least in low.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
        if self.marks > self.train.optim.steps:
            raise ConfigError(f"--marks {self.marks}: there are only {self.train.optim.steps} steps")
        if (name := self.quality_network) in (INCEPTION, I3D, CLAP):
            raise ConfigError(
                f"--quality-network {name} takes a file of weights, for which there is no flag here: take another, and "
                f"`layersync evaluate RUN --features {name} --features-weights FILE` for the runs of the comparison"
            )
        if not 0 <= self.pilot <= 1:
            raise ConfigError(f"--pilot {self.pilot}: expected a share of --steps, from 0 to 1")
        if (message := unused(self.train, self.arms())) is not None:
            raise ConfigError(message)
        apart = self.validation is not None or self.validation_split
        if not apart and self.train.align.features is not None:
            raise ConfigError("--features are those of all samples, so none can be held out: give --validation FILE")
        if self.validation is not None and self.validation_split:
            raise ConfigError("--validation and --validation-split exclude each other")
        if self.validation_split and self.train.data.split != "train":
            raise ConfigError(
                f"--validation-split takes the test split: give --split train, not {self.train.data.split}"
            )

    def arms(self) -> list[Arm]:
        """What is compared; raises ConfigError, see `arms`."""
        return arms(self.train, self.methods)

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        names = [arm.name for arm in self.arms()]
        return "vanilla" if "vanilla" in names else names[0]


@dataclass(frozen=True)
class CompareCommand(StartingPoint):
    """Train vanilla, LayerSync, REPA and both (or others) from the same seeds; write report.md, .png and .json.

    Each run trains for --steps, or for --max-seconds of training where that is less. Runs of one seed take turns, so
    that a slow spell of the machine hits all methods alike. Stopped and called again, it goes on where it was.
    """

    comparison: CompareConfig = field(default_factory=CompareConfig)
    out: Path = Path("runs/compare")
    """Folder of the comparison; its runs are METHOD/seed-N in it, as `layersync train` makes them."""
    devices: tuple[str, ...] = ()
    """Several, such as cuda:0 cuda:1, train a seed each at the same time, in a process of their own; cpu cpu halves the
    threads. Nothing: all on --device."""
    resume: bool = False
    """Take the settings of the comparison in --out, so that no flag has to be repeated."""
    study: str | None = None
    """Settings of a study of that name, below the flags; docs/results has what was found with them."""
    overwrite: bool = False
    """Put the new comparison in the place of that in --out, which is deleted."""


def load_sets(config: CompareConfig, device: torch.device) -> tuple[SampleSet, SampleSet]:
    """What the runs are trained on, and what is held out.

    Raises:
        ConfigError: there is not enough to hold out.
        DataError: the data cannot be used, or differs from that of --validation.
    """
    data = load_data(config.train.data, device)
    if config.validation is None and not config.validation_split:
        tenth = min(MOST_HELD_OUT, max(2, len(data) // 10))
        return hold_out(data, tenth if config.held_out is None else config.held_out)
    apart = dataclasses.replace(config.train.data, flip=False)
    if config.validation is None:
        apart = dataclasses.replace(apart, split="test")
    else:
        apart = dataclasses.replace(apart, data=str(config.validation))
    held_out = load_data(apart, device)
    if held_out.spec != data.spec or held_out.num_classes > data.num_classes:
        raise DataError(
            f"{config.validation or 'the test split'} has samples of {held_out.spec} in {held_out.num_classes} "
            f"classes; --data has {data.spec} in {data.num_classes}"
        )
    return data, held_out
