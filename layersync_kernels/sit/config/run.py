"""A whole run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from . import at_least, require
from .data import DataConfig
from .loss import AlignConfig, DispersiveConfig, LayerSyncConfig
from .model import ModelConfig
from .optim import OptimConfig
from .parallel import ParallelConfig
from .sampling import SamplingConfig, TransportConfig

CONFIG = "config.json"
"""Name of the config file in a run's folder."""

SAMPLES = "samples"
"""Name of the folder of sample grids in a run's folder."""


@dataclass(frozen=True)
class LogConfig:
    """What a run reports and keeps."""

    log_every: int = 100
    """Steps between records; the device is only read then. 1 also shows each of them as a line."""
    sample_every: int = 10_000
    """Steps between sample grids; 0: none at all."""
    grid_classes: int = 10
    """Rows of a grid: the first classes."""
    grid_columns: int = 8
    """Samples per class."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many checkpoints stay."""
    keep_every: int = 0
    """Those of a multiple of so many steps stay for good; 0: none does."""
    save_in_background: bool = True
    """Train on while a checkpoint is written, at the cost of a copy of it in the memory of the host."""
    tensorboard: bool = True
    """Write TensorBoard events, if it is installed."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the records too; None: none does."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        at_least(1, log_every=self.log_every, checkpoint_every=self.checkpoint_every, keep=self.keep)
        at_least(1, grid_classes=self.grid_classes, grid_columns=self.grid_columns)
        at_least(0, sample_every=self.sample_every, keep_every=self.keep_every)


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    layersync: LayerSyncConfig = field(default_factory=LayerSyncConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    log: LogConfig = field(default_factory=LogConfig)
    data: DataConfig = field(default_factory=DataConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    dispersive: DispersiveConfig = field(default_factory=DispersiveConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = 0
    """Fixes initialisation, data order and noise."""
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    threads: int | None = None
    """CPU threads of PyTorch's operators; None leaves them as they are (one per core)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto: bf16 where the device is faster with it, else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block; auto: on a GPU."""

    def validate(self) -> None:
        """Checks every range that does not depend on the data or the model.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        at_least(0, seed=self.seed)
        require(self.seed < 2**63, f"--seed {self.seed}: expected a number below 2**63")
        at_least(1, threads=self.threads)
        for group in (
            self.data,
            self.model,
            self.transport,
            self.align,
            self.dispersive,
            self.optim,
            self.sampling,
            self.log,
            self.parallel,
        ):
            group.validate()


@dataclass(frozen=True)
class OfRun:
    """A command about a trained model."""

    source: tyro.conf.Positional[Path]
    """A run, a checkpoint folder, a .safetensors file or a published .pt."""


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """Where the settings below the flags come from."""

    preset: str | None = None
    """Settings of that name. None: small, or images where there is no --data: minutes of two cores, as audio, motion
    and video. paper: 400,000 steps of the paper's optimiser; images-imagenet-256 and more, which docs/data.md lists:
    for cards."""
    config_file: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """A YAML or JSON file of settings: those that differ, in their groups or by the names of flags. Flags win."""
