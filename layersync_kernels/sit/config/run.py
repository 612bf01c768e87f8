"""A whole run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from .checks import require
from .data import DataConfig
from .loss import AlignConfig, LayerSyncConfig
from .model import ModelConfig
from .optim import OptimConfig
from .sampling import SamplingConfig, TransportConfig

CONFIG = "config.json"
"""Name of the config file in a run's folder."""

SAMPLES = "samples"
"""Name of the folder of sample grids in a run's folder."""


@dataclass(frozen=True)
class LogConfig:
    """What a run reports and keeps."""

    log_every: int = 100
    """Steps between records; the device is only read then."""
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
    tensorboard: bool = True
    """Write TensorBoard events, if it is installed."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    layersync: LayerSyncConfig = field(default_factory=LayerSyncConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    log: LogConfig = field(default_factory=LogConfig)
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
        optim, log, data, align = self.optim, self.log, self.data, self.align
        at_least = {
            ("steps", optim.steps): 1,
            ("batch-size", optim.batch_size): 1,
            ("accumulate", optim.accumulate): 1,
            ("warmup-steps", optim.warmup_steps): 0,
            ("weight-decay", optim.weight_decay): 0,
            ("log-every", log.log_every): 1,
            ("sample-every", log.sample_every): 0,
            ("checkpoint-every", log.checkpoint_every): 1,
            ("keep", log.keep): 1,
            ("grid-classes", log.grid_classes): 1,
            ("grid-columns", log.grid_columns): 1,
            ("image-size", 1 if data.image_size is None else data.image_size): 1,
            ("workers", data.workers): 0,
            ("seed", self.seed): 0,
            ("threads", 1 if self.threads is None else self.threads): 1,
            ("teacher-size", 1 if align.teacher_size is None else align.teacher_size): 1,
            ("projector-dim", 1 if align.projector_dim is None else align.projector_dim): 1,
        }
        for (flag, value), low in at_least.items():
            require(value >= low, f"--{flag} {value}: expected at least {low}")
        require(optim.lr > 0, f"--lr {optim.lr}: expected a positive number")
        require(
            optim.clip_norm is None or optim.clip_norm > 0, f"--clip-norm {optim.clip_norm}: expected a positive number"
        )
        require(
            optim.max_seconds is None or optim.max_seconds > 0,
            f"--max-seconds {optim.max_seconds}: expected a positive number",
        )
        for flag, share in {
            "ema-decay": optim.ema_decay,
            "betas": optim.betas[0],
            "betas ": optim.betas[1],
            "class-dropout": self.model.class_dropout,
        }.items():
            require(0 <= share < 1, f"--{flag.strip()} {share}: expected a number in [0, 1)")
        require(
            optim.batch_size % optim.accumulate == 0,
            f"--batch-size {optim.batch_size} does not divide into --accumulate {optim.accumulate} equal passes",
        )
        require(
            align.align == "off" or align.teacher is not None or align.features is not None,
            f"--align {align.align} needs --teacher, for instance efficientnet-lite0, or --features",
        )
        require(
            align.align != "off" or (align.teacher is None and align.features is None),
            "--teacher and --features are used by --align repa or irepa only, which is off",
        )
        self.sampling.validate()


@dataclass(frozen=True)
class OfRun:
    """A command about a trained model."""

    source: tyro.conf.Positional[Path]
    """A run, a checkpoint folder, a .safetensors file or a published .pt."""
