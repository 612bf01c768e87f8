"""Images per second of the reference trainer, by where the LayerSync loss comes from."""

from __future__ import annotations

import torch
from rich.console import Console

from ..sit.config import ModelConfig, OptimConfig, TrainConfig
from ..sit.data import MemorySet
from ..sit.throughput import PROVIDERS, measure_throughput, provider_config
from .engine import machine_facts
from .report import new_table

# A step of SiT-S/2 at batch 8 takes about two seconds on two cores; SiT-XL/2 at 64 is what a GPU of 80 GB trains with.
_SETTINGS = {"cpu": ("SiT-S/2", 8), "cuda": ("SiT-XL/2", 64)}
_QUICK = ("SiT-S/8", 2)


def measure(device: str, *, quick: bool = False) -> list[dict[str, object]]:
    """Optimiser steps on random latents (4, 32, 32), all providers in turns.

    Args:
        device: "cpu" or "cuda".
        quick: a small model and few steps.

    Returns:
        one row per provider with `images_per_s` (median over rounds), its `low` and `high`, and its ratio to plain SiT
        without LayerSync, to the eager loss and to torch.compile: `vs_plain`, `vs_eager`, `vs_compile`.
    """
    model, batch = _QUICK if quick else _SETTINGS[device]
    samples = MemorySet(
        samples=torch.randn(4 * batch, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(device),
        labels=torch.arange(4 * batch, device=device) % 1000,
        shape=(4, 32, 32),
        num_classes=1000,
        class_names=[str(label) for label in range(1000)],
        latent=True,
    )
    config = TrainConfig(model=ModelConfig(model=model), optim=OptimConfig(batch_size=batch), device=device)
    configs = {name: provider_config(config, name) for name in PROVIDERS}
    steps = 10 if device == "cuda" else 1
    speeds = measure_throughput(configs, steps=steps, rounds=2 if quick else 7, warmup=2, data=samples)
    facts = machine_facts(device)
    return [
        {
            "op": "trainer",
            "case": f"{model} batch {batch}",
            "provider": name,
            "device": device,
            "images_per_s": speed.median,
            "low": min(speed.rounds),
            "high": max(speed.rounds),
            "vs_plain": speed.over(speeds["plain"]),
            "vs_eager": speed.over(speeds["eager"]),
            "vs_compile": speed.over(speeds["compile"]),
            "machine": facts,
        }
        for name, speed in speeds.items()
    ]


def print_table(rows: list[dict[str, object]], console: Console) -> None:
    """The rows of `measure`."""
    title = f"trainer, {rows[0]['case']}, {rows[0]['device']}: optimiser steps"
    table = new_table(title, "loss", "images/s", "slowest", "fastest", "x plain SiT", "x eager", "x compile")
    for row in rows:
        numbers = (row[key] for key in ("images_per_s", "low", "high", "vs_plain", "vs_eager", "vs_compile"))
        table.add_row(str(row["provider"]), *(f"{number:.3f}" for number in numbers))
    console.print(table)
