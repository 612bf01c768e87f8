"""How many images per second the trainer does, by what computes its blocks and the LayerSync loss."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from ..integrate import apply_layersync_kernels
from ..sit.batch import Batch
from ..sit.config.loss import LayerSyncConfig
from ..sit.config.model import ModelConfig
from ..sit.config.optim import OptimConfig
from ..sit.config.run import TrainConfig
from ..sit.data.base import SampleSet
from ..sit.data.memory import MemorySet
from ..sit.data.registry import load_data
from ..sit.device import resolve_device
from ..sit.modality.latents import Latents
from ..sit.spec import SampleSpec
from ..sit.training.loop import Trainer
from ..sit.training.state import TrainState
from ..sit.training.terms.base import LossTerm, Setting
from ..sit.training.terms.layersync import LayerSyncTerm
from .engine import DeviceLost, describe_failure, device_lost
from .machine import machine_facts
from .report import new_table

PROVIDERS = ("fused", "off", "applied", "eager", "compile", "published")
# A step of SiT-S/2 at batch 8 takes a second or two on two cores; SiT-XL/2 at 64 is what a GPU of 80 GB trains with.
SETTINGS = {"cpu": ("SiT-S/2", 8), "cuda": ("SiT-XL/2", 64)}
"""Device to model and batch."""
STEPS = {"cpu": 1, "cuda": 4}
"""Device to optimiser steps of a turn."""
ROUNDS = {"cpu": 10, "cuda": 5}
"""Device to rounds."""
QUICK = ("SiT-P/8", 2)
"""The model and batch of `--quick`."""
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
        decay = self.config.ema_decays[0]
        for average, weight in zip(self.averages[0], self.weights, strict=True):
            average.mul_(decay).add_(weight, alpha=1 - decay)


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


@dataclass(frozen=True)
class Turn:
    """What a contender did in a round: a rate, or the error that has taken it out of the contest."""

    round: int
    name: str
    images_per_s: float | None = None
    error: Exception | None = None


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


class _Contest:
    """Trainers of several configurations. Those that differ in LayerSync alone share one.

    Two trainers of the same differ by a percent or two, by where their memory happens to lie, which is more than
    LayerSync costs.
    """

    def __init__(self, trainers: Mapping[str, type[Trainer]], data: SampleSet | None) -> None:
        self._kinds, self._data = trainers, data
        self._shared: dict[object, tuple[Trainer, Iterator[Batch]]] = {}
        self._entered: dict[str, tuple[object, list[LossTerm]]] = {}

    def enter(self, name: str, config: TrainConfig, warmup: int) -> None:
        """Build what a contender needs, and let it do untimed steps, in which it compiles."""
        kind = self._kinds.get(name, Trainer)
        key = kind, dataclasses.replace(config, layersync=LayerSyncConfig())
        if key not in self._shared:
            own = self._data if self._data is not None else load_data(config.data, resolve_device(config.device))
            trainer = kind(config, own)
            self._shared[key] = trainer, trainer.batches()
        trainer, batches = self._shared[key]
        layersync = LayerSyncTerm.build(Setting(config, trainer.model, trainer.data, trainer.device))
        others = [term for term in trainer.state.terms if not isinstance(term, LayerSyncTerm)]
        trainer.state.terms = terms = others if layersync is None else [layersync, *others]
        self._entered[name] = key, terms
        for _ in range(warmup):
            trainer.step(next(batches))

    def turn(self, name: str, steps: int) -> float:
        """Images per second of some steps."""
        key, terms = self._entered[name]
        trainer, batches = self._shared[key]
        trainer.state.terms = terms
        ready = [next(batches) for _ in range(steps)]
        _synchronize(trainer.device)
        began = time.perf_counter()
        for batch in ready:
            trainer.step(batch)
        _synchronize(trainer.device)
        rate = steps * trainer.config.optim.batch_size / (time.perf_counter() - began)
        trainer.check_finite()
        return rate

    def leave(self, name: str) -> None:
        """Give a contender's memory back, unless another shares its trainer."""
        self._entered.pop(name, None)
        held = {key for key, _ in self._entered.values()}
        self._shared = {key: shared for key, shared in self._shared.items() if key in held}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def turns(
    configs: Mapping[str, TrainConfig],
    *,
    trainers: Mapping[str, type[Trainer]] | None = None,
    steps: int = 5,
    rounds: int = 5,
    warmup: int = 2,
    max_seconds: float = math.inf,
    data: SampleSet | None = None,
    first: int = 0,
) -> Iterator[Turn]:
    """Times optimiser steps of several configurations, in turns, so that a slow spell of the machine hits them alike.

    Args:
        configs: name to configuration.
        trainers: name to the class of its trainer, where that is not `Trainer`.
        steps: optimiser steps per round.
        rounds: times each configuration gets its turn.
        warmup: untimed steps at first.
        max_seconds: begin no further round after this time.
        data: one set for all; by default each configuration's own.
        first: number of the first round.

    Yields:
        each turn when it is over. A contender that fails has one turn with its error, and the others go on.

    Raises:
        ValueError: numbers out of range.
        DeviceLost: a contender has left the device unusable.
    """
    if steps < 1 or rounds < 1 or warmup < 0:
        raise ValueError(f"steps={steps}, rounds={rounds}, warmup={warmup}; expected at least 1, 1 and 0")
    contest = _Contest(trainers or {}, data)
    live: list[str] = []

    def out(number: int, name: str, error: Exception) -> Iterator[Turn]:
        yield Turn(number, name, error=error)
        if device_lost(resolve_device(configs[name].device).type):
            raise DeviceLost(f"{name} has left the device unusable: {describe_failure(error)}") from error
        traceback.clear_frames(error.__traceback__)  # they hold tensors, which the others may need room for

    for name, config in configs.items():
        try:
            contest.enter(name, config, warmup)
            live.append(name)
        except Exception as error:  # out of memory, or what a compiler says
            yield from out(first, name, error)
            contest.leave(name)
    end = time.perf_counter() + max_seconds
    for number in range(first, first + rounds):
        if number > first and time.perf_counter() > end:
            break
        for name in list(live if number % 2 == 0 else reversed(live)):
            try:
                yield Turn(number, name, contest.turn(name, steps))
            except Exception as error:
                live.remove(name)
                yield from out(number, name, error)
                contest.leave(name)


def measure_throughput(configs: Mapping[str, TrainConfig], **options: Any) -> dict[str, Throughput]:
    """The rates of all `turns`, with the same arguments; the first error of a contender is raised."""
    rates: dict[str, list[float]] = {name: [] for name in configs}
    for turn in turns(configs, **options):
        if turn.error is not None:
            raise turn.error
        assert turn.images_per_s is not None
        rates[turn.name].append(turn.images_per_s)
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


def latents(batch: int, device: torch.device) -> MemorySet:
    """Four batches of random latents (4, 32, 32), of 1000 classes."""
    return MemorySet(
        samples=torch.randn(4 * batch, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(device),
        labels=torch.arange(4 * batch, device=device) % 1000,
        spec=SampleSpec(4, (32, 32)),
        num_classes=1000,
        class_names=[str(label) for label in range(1000)],
        modality=Latents(),
    )


def measure(
    device: str, *, quick: bool = False, earlier: Iterable[Mapping[str, Any]] = ()
) -> Iterator[dict[str, object]]:
    """Optimiser steps on random latents (4, 32, 32), all contenders in turns.

    Args:
        device: "cpu" or "cuda".
        quick: a small model and few steps.
        earlier: rows of this machine that a run which was cut short has left. Their rounds count, and a contender with
            a problem stays out.

    Yields:
        a row, "trainer turn", for each contender and `round` as it is over, with `images_per_s` or a `problem`; in the
        end a row, "trainer", for each contender with `images_per_s` (median over rounds), its `low` and `high`, and how
        many times the rate of others it has, round by round: `vs_fused`, `vs_off` (without LayerSync), `vs_eager` (of
        its own precision), `vs_compile`, `vs_published`.

    Raises:
        DeviceLost: a contender has left the device unusable; start again in a new process, with the rows so far.
    """
    model, batch = QUICK if quick else SETTINGS[device]
    config = TrainConfig(model=ModelConfig(model=model), optim=OptimConfig(batch_size=batch), device=device)
    common = {"case": f"{model} batch {batch}", "device": device, "machine": machine_facts(device)}
    seen = [dict(row) for row in earlier if row.get("op") == "trainer turn" and row.get("case") == common["case"]]
    out = {row["provider"] for row in seen if row["problem"] is not None}
    configs = {name: its for name, its in contenders(config).items() if name not in out}
    left = (2 if quick else ROUNDS[device]) - len(_complete_rounds(seen))
    if left > 0 and configs:
        steps = STEPS[device]
        first = 1 + max((row["round"] for row in seen), default=-1)
        for turn in turns(
            configs,
            trainers=TRAINERS,
            steps=steps,
            rounds=left,
            warmup=2,
            data=latents(batch, torch.device(device)),
            first=first,
        ):
            problem = None if turn.error is None else describe_failure(turn.error)
            row = {"op": "trainer turn", "provider": turn.name, "round": turn.round}
            seen.append(row | {"images_per_s": turn.images_per_s, "problem": problem} | common)
            yield seen[-1]
    for row in _summary(seen):
        yield {"op": "trainer"} | row | common


def _complete_rounds(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Provider to rate of each round in which all had their turn that did not fail later or before."""
    rows = list(rows)
    live = {row["provider"] for row in rows} - {row["provider"] for row in rows if row["problem"] is not None}
    rounds: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["provider"] in live:
            rounds.setdefault(row["round"], {})[row["provider"]] = row["images_per_s"]
    return [rates for _, rates in sorted(rounds.items()) if rates.keys() == live]


def _summary(rows: list[dict[str, Any]]) -> Iterator[dict[str, object]]:
    rounds = _complete_rounds(rows)
    names = list(rounds[0]) if rounds else []
    names.sort(key=list(dict.fromkeys(row["provider"] for row in rows)).index)
    speeds = {name: Throughput(tuple(rates[name] for rates in rounds)) for name in names}
    for name, speed in speeds.items():
        row: dict[str, object] = {"provider": name, "problem": None}
        row |= {"images_per_s": speed.median, "low": min(speed.rounds), "high": max(speed.rounds)}
        for other in _AGAINST:
            own = "eager fp32" if other == "eager" and name.endswith("fp32") else other
            row[f"vs_{other}"] = speed.over(speeds[own]) if own in speeds else None
        yield row
    for row in rows:
        if row["problem"] is not None:
            yield {"provider": row["provider"], "problem": row["problem"]}


def print_table(rows: Iterable[Mapping[str, object]], console: Console) -> None:
    """The rows of `measure` that sum up, and what failed."""
    rows = [row for row in rows if row["op"] == "trainer"]
    for row in rows:
        if row["problem"] is not None:
            console.print(f"{row['case']}: {row['provider']} not timed: {row['problem']}", highlight=False)
    timed = [row for row in rows if row["problem"] is None]
    if not timed:
        return
    title = f"trainer, {timed[0]['case']}, {timed[0]['device']}: optimiser steps"
    table = new_table(
        title, "blocks", "images/s", "slowest", "fastest", *(f"x\n{name:.7}" for name in _AGAINST)
    )  # 80 columns
    for row in timed:
        numbers = (row[key] for key in ("images_per_s", "low", "high", *(f"vs_{name}" for name in _AGAINST)))
        table.add_row(str(row["provider"]), *("" if number is None else f"{number:.3f}" for number in numbers))
    console.print(table)
