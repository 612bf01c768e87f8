"""How many images per second the trainer does, by where the LayerSync loss comes from."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .build import resolve_device
from .config import TrainConfig
from .data import SampleSet, load_data
from .train import Trainer

PROVIDERS = ("fused", "eager", "compile", "plain")


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
    """`config` with the loss of a provider.

    fused: the configured backend. eager: plain PyTorch. compile: plain PyTorch, blocks under torch.compile. plain: no
    LayerSync at all.
    """
    if provider == "fused":
        return config
    if provider == "plain":
        return dataclasses.replace(config, layersync=dataclasses.replace(config.layersync, layersync=("off",)))
    if provider not in PROVIDERS:
        raise ValueError(f"no provider {provider!r}; expected one of {PROVIDERS}")
    reference = dataclasses.replace(config.layersync, loss_backend="reference")
    return dataclasses.replace(config, layersync=reference, compile="on" if provider == "compile" else config.compile)


def measure_throughput(
    configs: Mapping[str, TrainConfig],
    *,
    steps: int = 5,
    rounds: int = 5,
    warmup: int = 2,
    max_seconds: float = math.inf,
    data: SampleSet | None = None,
) -> dict[str, Throughput]:
    """Times optimiser steps of several configurations, in turns, so that a slow spell of the machine hits them alike.

    Args:
        configs: name to configuration.
        steps: optimiser steps per round.
        rounds: times each configuration gets its turn.
        warmup: untimed steps at first.
        max_seconds: begin no further round after this time.
        data: one set for all; by default each configuration's own.
    """
    if steps < 1 or rounds < 1 or warmup < 0:
        raise ValueError(f"steps={steps}, rounds={rounds}, warmup={warmup}; expected at least 1, 1 and 0")
    trainers = {}
    for name, config in configs.items():
        own = data if data is not None else load_data(config.data, resolve_device(config.device))
        trainer = Trainer(config, own)
        batches = own.batches(config.optim.batch_size, seed=config.seed)
        trainers[name] = (trainer, batches)
        for _ in range(warmup):
            trainer.step(*(tensor.to(trainer.device) for tensor in next(batches)))
    rates: dict[str, list[float]] = {name: [] for name in configs}
    end = time.perf_counter() + max_seconds
    for number in range(rounds):
        if number > 0 and time.perf_counter() > end:
            break
        for name, (trainer, batches) in trainers.items():
            ready = [[tensor.to(trainer.device) for tensor in next(batches)] for _ in range(steps)]
            _synchronize(trainer.device)
            began = time.perf_counter()
            for samples, labels in ready:
                trainer.step(samples, labels)
            _synchronize(trainer.device)
            rates[name].append(steps * trainer.config.optim.batch_size / (time.perf_counter() - began))
            trainer.check_finite()
    return {name: Throughput(tuple(values)) for name, values in rates.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
