"""How many images per second the trainer does, by what computes its blocks and the LayerSync loss."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from ..integrate import apply_layersync_kernels
from ..sit.config.loss import LayerSyncConfig
from ..sit.config.model import ModelConfig
from ..sit.config.optim import OptimConfig
from ..sit.config.run import TrainConfig
from ..sit.data.base import SampleSet
from ..sit.data.memory import MemorySet
from ..sit.data.registry import load_data
from ..sit.device import resolve_device
from ..sit.spec import SampleSpec
from ..sit.training.loop import Trainer
from ..sit.training.state import TrainState
from ..sit.training.terms.base import LossTerm, Setting
from ..sit.training.terms.layersync import LayerSyncTerm
from .engine import machine_facts
from .report import new_table

PROVIDERS = ("fused", "off", "applied", "eager", "compile", "published")
# A step of SiT-S/2 at batch 8 takes a second or two on two cores; SiT-XL/2 at 64 is what a GPU of 80 GB trains with.
_SETTINGS = {"cpu": ("SiT-S/2", 8), "cuda": ("SiT-XL/2", 64)}
_QUICK = ("SiT-P/8", 2)
_AGAINST = ("fused", "off", "eager", "compile", "published")


class PublishedState(TrainState):
    """With the optimiser and the moving average of the published code: loops over parameters."""

    def build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW that is not fused."""
        optim = self.config
        return torch.optim.AdamW(self.trained, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)

    @torch.no_grad()
    def move_average(self) -> None:
        """Without warm-up."""
        for average, weight in zip(self.averages, self.weights, strict=True):
            average.mul_(self.config.ema_decay).add_(weight, alpha=1 - self.config.ema_decay)


class PublishedTrainer(Trainer):
    """The trainer with the state of the published code."""

    state_type = PublishedState


class AppliedTrainer(Trainer):
    """The trainer of somebody else's model: plain blocks, replaced by `apply_layersync_kernels`."""

    def __init__(self, config: TrainConfig, data: SampleSet) -> None:
        super().__init__(config, data)
        apply_layersync_kernels(self.model)


TRAINERS = {"published": PublishedTrainer, "applied": AppliedTrainer}
"""Provider to trainer, where that is not `Trainer`."""


@dataclass(frozen=True)
class Throughput:
    """Images per second in each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.rounds)

    def over(self, other: Throughput) -> float:
        """How many times the rate of `other`: the median over rounds of the ratio inside a round."""
        return statistics.median(own / its for own, its in zip(self.rounds, other.rounds, strict=True))


def provider_config(config: TrainConfig, provider: str) -> TrainConfig:
    """`config` as a provider trains it.

    fused: as it is. off: without LayerSync. eager: blocks and loss in plain PyTorch. compile: that, with the blocks
    under torch.compile. published: that of `eager` in fp32, and applied: plain blocks with the fused loss, for their
    `TRAINERS`.
    """
    replace = dataclasses.replace
    if provider == "fused":
        return config
    if provider == "off":
        return replace(config, layersync=replace(config.layersync, layersync=("off",)))
    if provider not in PROVIDERS:
        raise ValueError(f"no provider {provider!r}; expected one of {PROVIDERS}")
    plain = replace(
        config,
        model=replace(config.model, kernels="eager"),
        layersync=config.layersync if provider == "applied" else replace(config.layersync, loss_backend="reference"),
        compile="on" if provider == "compile" else "off",
    )
    return replace(plain, precision="fp32") if provider == "published" else plain


def measure_throughput(
    configs: Mapping[str, TrainConfig],
    *,
    trainers: Mapping[str, type[Trainer]] | None = None,
    steps: int = 5,
    rounds: int = 5,
    warmup: int = 2,
    max_seconds: float = math.inf,
    data: SampleSet | None = None,
) -> dict[str, Throughput]:
    """Times optimiser steps of several configurations, in turns, so that a slow spell of the machine hits them alike.

    Configurations that differ in LayerSync alone share a trainer: two of the same differ by a percent or two, by where
    their memory happens to lie, which is more than LayerSync costs.

    Args:
        configs: name to configuration.
        trainers: name to the class of its trainer, where that is not `Trainer`.
        steps: optimiser steps per round.
        rounds: times each configuration gets its turn.
        warmup: untimed steps at first.
        max_seconds: begin no further round after this time.
        data: one set for all; by default each configuration's own.
    """
    if steps < 1 or rounds < 1 or warmup < 0:
        raise ValueError(f"steps={steps}, rounds={rounds}, warmup={warmup}; expected at least 1, 1 and 0")
    shared: dict[object, tuple[Trainer, Iterator[tuple[Tensor, ...]]]] = {}
    contenders = {}
    for name, config in configs.items():
        kind = (trainers or {}).get(name, Trainer)
        key = kind, dataclasses.replace(config, layersync=LayerSyncConfig())
        if key not in shared:
            own = data if data is not None else load_data(config.data, resolve_device(config.device))
            trainer = kind(config, own)
            shared[key] = trainer, trainer.batches()
        trainer, batches = shared[key]
        layersync = LayerSyncTerm.build(Setting(config, trainer.model, trainer.data, trainer.device))
        others = [term for term in trainer.state.terms if not isinstance(term, LayerSyncTerm)]
        terms: list[LossTerm] = others if layersync is None else [layersync, *others]
        trainer.state.terms = terms
        contenders[name] = (trainer, batches, terms)
        for _ in range(warmup):
            trainer.step(*next(batches))
    rates: dict[str, list[float]] = {name: [] for name in configs}
    end = time.perf_counter() + max_seconds
    for number in range(rounds):
        if number > 0 and time.perf_counter() > end:
            break
        turns = list(contenders.items())
        for name, (trainer, batches, terms) in turns if number % 2 == 0 else reversed(turns):
            trainer.state.terms = terms
            ready = [next(batches) for _ in range(steps)]
            _synchronize(trainer.device)
            began = time.perf_counter()
            for batch in ready:
                trainer.step(*batch)
            _synchronize(trainer.device)
            rates[name].append(steps * trainer.config.optim.batch_size / (time.perf_counter() - began))
            trainer.check_finite()
    return {name: Throughput(tuple(values)) for name, values in rates.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def contenders(config: TrainConfig) -> dict[str, TrainConfig]:
    """What is timed on a device: `PROVIDERS`, and on a CPU recompute="light", and fused and eager in fp32.

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
