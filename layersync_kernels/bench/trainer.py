"""Images per second of the reference trainer, by what computes its blocks and the LayerSync loss."""

from __future__ import annotations

import dataclasses

import torch
from rich.console import Console

from ..sit.config.model import ModelConfig
from ..sit.config.optim import OptimConfig
from ..sit.config.run import TrainConfig
from ..sit.data.memory import MemorySet
from ..sit.spec import SampleSpec
from .engine import machine_facts
from .report import new_table
from .throughput import TRAINERS, measure_throughput, provider_config

# A step of SiT-S/2 at batch 8 takes a second or two on two cores; SiT-XL/2 at 64 is what a GPU of 80 GB trains with.
_SETTINGS = {"cpu": ("SiT-S/2", 8), "cuda": ("SiT-XL/2", 64)}
_QUICK = ("SiT-P/8", 2)
_AGAINST = ("fused", "off", "eager", "compile", "published")


def contenders(config: TrainConfig) -> dict[str, TrainConfig]:
    """What is timed on a device: `throughput.PROVIDERS`, and on a CPU recompute="light", and fused and eager in fp32.

    A GPU of 80 GB does not hold all of them at SiT-XL/2.
    """
    names = ("fused", "off", "applied", "eager", "compile")
    configs = {name: provider_config(config, name) for name in names}
    if config.device == "cpu":
        configs["published"] = provider_config(config, "published")
        light = dataclasses.replace(config.model, recompute="light")
        configs["light"] = dataclasses.replace(config, model=light)
        wide = dataclasses.replace(config, precision="fp32")
        configs |= {f"{name} fp32": provider_config(wide, name) for name in ("fused", "eager")}
    return configs


def measure(device: str, *, quick: bool = False) -> list[dict[str, object]]:
    """Optimiser steps on random latents (4, 32, 32), all contenders in turns.

    Args:
        device: "cpu" or "cuda".
        quick: a small model and few steps.

    Returns:
        one row per contender with `images_per_s` (median over rounds), its `low` and `high`, and how many times the
        rate of others it has, round by round: `vs_fused`, `vs_off` (without LayerSync), `vs_eager` (of its own
        precision), `vs_compile`, `vs_published`.
    """
    model, batch = _QUICK if quick else _SETTINGS[device]
    samples = MemorySet(
        samples=torch.randn(4 * batch, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(device),
        labels=torch.arange(4 * batch, device=device) % 1000,
        spec=SampleSpec(4, (32, 32)),
        num_classes=1000,
        class_names=[str(label) for label in range(1000)],
        latent=True,
    )
    config = TrainConfig(model=ModelConfig(model=model), optim=OptimConfig(batch_size=batch), device=device)
    steps = 10 if device == "cuda" else 1
    speeds = measure_throughput(
        contenders(config),
        trainers=TRAINERS,
        steps=steps,
        rounds=2 if quick else 10,
        warmup=2,
        data=samples,
    )
    facts = machine_facts(device)
    rows = []
    for name, speed in speeds.items():
        row: dict[str, object] = {
            "op": "trainer",
            "case": f"{model} batch {batch}",
            "provider": name,
            "device": device,
            "images_per_s": speed.median,
            "low": min(speed.rounds),
            "high": max(speed.rounds),
        }
        for other in _AGAINST:
            own = "eager fp32" if other == "eager" and name.endswith("fp32") else other
            row[f"vs_{other}"] = speed.over(speeds[own]) if own in speeds else None
        rows.append(row | {"machine": facts})
    return rows


def print_table(rows: list[dict[str, object]], console: Console) -> None:
    """The rows of `measure`."""
    title = f"trainer, {rows[0]['case']}, {rows[0]['device']}: optimiser steps"
    table = new_table(title, "blocks and loss", "images/s", "slowest", "fastest", *(f"x {name}" for name in _AGAINST))
    for row in rows:
        numbers = (row[key] for key in ("images_per_s", "low", "high", *(f"vs_{name}" for name in _AGAINST)))
        table.add_row(str(row["provider"]), *("" if number is None else f"{number:.3f}" for number in numbers))
    console.print(table)
