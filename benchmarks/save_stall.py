"""How long training waits for checkpoints that are written in the background, and how long they take.

    python benchmarks/save_stall.py [OUT.json] [--saves 5] [--width 768] [--depth 12]

A SiT trains on noise; all times are those that the trainer records itself (`save_seconds`, `save_wait`).
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.config.model import ModelConfig
from layersync_kernels.sit.config.optim import OptimConfig
from layersync_kernels.sit.config.run import LogConfig, TrainConfig
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.files import write_json
from layersync_kernels.sit.spec import SampleSpec
from layersync_kernels.sit.training.folder import start_run
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.runlog import read_records


@dataclass(frozen=True)
class Command:
    """What is measured."""

    out: Annotated[Path | None, tyro.conf.Positional] = None
    """Where the figures go as JSON."""
    saves: int = 5
    """Checkpoints in the background; the first one is told apart."""
    every: int = 4
    """Steps from one to the next."""
    width: int = 768
    depth: int = 12
    batch_size: int = 8
    device: str = "auto"


def measure(command: Command) -> dict[str, object]:
    """The figures, see the module."""
    data = MemorySet(
        spec=SampleSpec(4, (32, 32)),
        num_classes=1,
        class_names=["noise"],
        samples=torch.randint(0, 256, (64, 4, 32, 32), dtype=torch.uint8),
        labels=torch.zeros(64, dtype=torch.long),
    )
    config = TrainConfig(
        data=DataConfig(data="unused"),
        model=ModelConfig(
            model="SiT-B/2", hidden_size=command.width, depth=command.depth, num_heads=command.width // 64
        ),
        optim=OptimConfig(steps=command.saves * command.every + command.every, batch_size=command.batch_size),
        log=LogConfig(log_every=1, sample_every=0, checkpoint_every=command.every, tensorboard=False),
        device=command.device,
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        start_run(run, config, overwrite=False)
        trainer = Trainer(config, data, run_dir=run)
        trainer.fit()
        records = read_records(run)
        newest = max((run / "checkpoints").iterdir())
        size = sum(path.stat().st_size for path in newest.rglob("*.safetensors"))
    saves = [(r["save_seconds"], r["save_wait"]) for r in records if "save_seconds" in r]
    first, *others = saves
    steps = [command.batch_size / r["samples_per_second"] for r in records]
    return {
        "device": str(trainer.device),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "gigabytes": size / 1e9,
        "step_seconds": statistics.median(steps),
        "first_save_seconds": first[0],
        "first_save_wait": first[1],
        "save_seconds": statistics.median(seconds for seconds, _ in others),
        "save_wait": statistics.median(waited for _, waited in others),
        "share_waited": sum(waited for _, waited in others) / sum(seconds for seconds, _ in others),
    }


if __name__ == "__main__":
    command = tyro.cli(Command, description=__doc__)
    figures = measure(command)
    for name, value in figures.items():
        print(f"{name:20} {value:.4g}" if isinstance(value, float) else f"{name:20} {value}")
    if command.out is not None:
        write_json(command.out, figures)
