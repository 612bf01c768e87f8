"""How many images per second the trainer does, by what computes its blocks and the LayerSync loss."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..integrate import apply_layersync_kernels
from ..sit.config.loss import LayerSyncConfig
from ..sit.config.run import TrainConfig
from ..sit.data.base import SampleSet
from ..sit.data.registry import load_data
from ..sit.device import resolve_device
from ..sit.training.loop import Trainer
from ..sit.training.state import TrainState
from ..sit.training.terms.base import LossTerm, Setting
from ..sit.training.terms.layersync import LayerSyncTerm

PROVIDERS = ("fused", "off", "applied", "eager", "compile", "published")


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
