"""`layersync demo`: what the library does, shown in minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from ..sit.commands.arguments import INTERRUPTED, parse, starting_point
from ..sit.commands.sample import SampleCommand, sample
from ..sit.commands.train import run_training
from ..sit.config.run import SAMPLES, StartingPoint, TrainConfig
from ..sit.console import console, start_logging
from ..sit.presets.registry import PRESETS
from ..sit.training.runlog import CURVES
from .throughput import measure_throughput, provider_config


@dataclass(frozen=True)
class DemoCommand(StartingPoint):
    """Train a small SiT on real data for a few minutes, sample from it and compare the speed of the losses."""

    config: TrainConfig = field(default_factory=lambda: PRESETS["images"])
    out: Path = Path("runs/demo")
    """Folder of the run."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    overwrite: bool = True
    """Put this run in the place of an earlier demo in --out, which is deleted."""


def demo_main(argv: Sequence[str]) -> int:
    """`layersync demo`."""
    start_logging()
    began = time.monotonic()
    command = parse(DemoCommand, argv, default=DemoCommand(config=starting_point(argv)), command="demo")
    out = command.out
    outcome = run_training(
        command.config, out, resume=command.resume, overwrite=command.overwrite and not command.resume
    )
    if outcome.ended == "interrupted":
        return INTERRUPTED
    shown = sample(SampleCommand(out, sampling=command.config.sampling, transport=command.config.transport))
    console.print("timing the trainer's step ...")
    configs = {name: provider_config(command.config, name) for name in ("fused", "off", "eager")}
    rates = measure_throughput(configs, steps=5, rounds=30, warmup=3, max_seconds=30)
    table = Table("blocks and loss", "samples/s", "slowest to fastest round", "against eager")
    meaning = {
        "fused": "fused, LayerSync",
        "off": "fused, no LayerSync",
        "eager": "eager PyTorch, LayerSync",
    }
    for name, rate in rates.items():
        spread = f"{min(rate.rounds):.0f} to {max(rate.rounds):.0f}"
        table.add_row(meaning[name], f"{rate.median:.0f}", spread, f"{rate.over(rates['eager']):.3f}x")
    console.print(table)
    print(f"samples, one row per class: {shown}")
    print(f"loss and cosine curves:     {out / CURVES}")
    print(f"samples while it learned:   {out / SAMPLES}")
    print(f"checkpoints and log:        {out}")
    print(f"{outcome.step} steps in {outcome.seconds:.0f} s of training, {time.monotonic() - began:.0f} s in all")
    return 0
