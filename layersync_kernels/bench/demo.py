"""`layersync demo`: what the library does, shown in minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from ..sit.commands.arguments import INTERRUPTED, parse
from ..sit.commands.sample import SampleCommand, sample
from ..sit.commands.train import run_training
from ..sit.config.data import DataConfig
from ..sit.config.model import ModelConfig
from ..sit.config.optim import OptimConfig
from ..sit.config.run import SAMPLES, LogConfig, TrainConfig
from ..sit.config.sampling import SamplingConfig
from ..sit.console import console, start_logging
from ..sit.training.runlog import CURVES
from .throughput import measure_throughput, provider_config


@dataclass(frozen=True)
class DemoCommand:
    """Train a small SiT on real digits for a few minutes, sample from it and compare the speed of the losses."""

    config: TrainConfig = field(default_factory=lambda: demo_config())
    out: Path = Path("runs/demo")
    """Folder of the run."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    overwrite: bool = True
    """Put this run in the place of an earlier demo in --out, which is deleted."""


def demo_config() -> TrainConfig:
    """Settings with which two CPU cores learn to draw recognisable digits in five minutes.

    On this budget steps count: a small model, small batches and a high rate. Velocity loss on fixed noise and times
    after 150 CPU seconds: width 96 0.300; width 128 0.317, with batches of 32 0.333, and at half the rate too 0.354.
    Depth 4 gets lower still (0.287), yet what depth 6 draws looks better.
    """
    return TrainConfig(
        data=DataConfig(data="mnist", image_size=14),
        model=ModelConfig(model="SiT-P/2", hidden_size=96, num_heads=3),
        optim=OptimConfig(
            steps=20_000,
            max_seconds=300.0,
            batch_size=16,
            lr=4e-3,
            lr_schedule="cosine",
            warmup_steps=100,
            betas=(0.9, 0.99),
            clip_norm=1.0,
            ema_decay=0.995,
            ema_warmup=True,
        ),
        sampling=SamplingConfig(solver="heun", sampling_steps=25, cfg_scale=2.0),
        log=LogConfig(log_every=50, sample_every=1500, checkpoint_every=1500),
        precision="fp32",  # bf16 is no faster at this width
    )


def demo_main(argv: Sequence[str]) -> int:
    """`layersync demo`."""
    start_logging()
    began = time.monotonic()
    command = parse(DemoCommand, argv, default=DemoCommand(), command="demo")
    out = command.out
    outcome = run_training(
        command.config, out, resume=command.resume, overwrite=command.overwrite and not command.resume
    )
    if outcome.ended == "interrupted":
        return INTERRUPTED
    grid = sample(SampleCommand(out, sampling=command.config.sampling, transport=command.config.transport))
    console.print("timing the trainer's step ...")
    configs = {name: provider_config(command.config, name) for name in ("fused", "off", "eager")}
    rates = measure_throughput(configs, steps=5, rounds=30, warmup=3, max_seconds=30)
    table = Table("blocks and loss", "images/s", "slowest to fastest round", "against eager")
    meaning = {
        "fused": "fused, LayerSync",
        "off": "fused, no LayerSync",
        "eager": "eager PyTorch, LayerSync",
    }
    for name, rate in rates.items():
        spread = f"{min(rate.rounds):.0f} to {max(rate.rounds):.0f}"
        table.add_row(meaning[name], f"{rate.median:.0f}", spread, f"{rate.over(rates['eager']):.3f}x")
    console.print(table)
    print(f"samples, one row per class: {grid}")
    print(f"loss and cosine curves:     {out / CURVES}")
    print(f"grids while it learned:     {out / SAMPLES}")
    print(f"checkpoints and log:        {out}")
    print(f"{outcome.step} steps in {outcome.seconds:.0f} s of training, {time.monotonic() - began:.0f} s in all")
    return 0
