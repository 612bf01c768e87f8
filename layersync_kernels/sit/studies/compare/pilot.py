"""A pilot: two short seeds tell how much differences move from seed to seed, and so how many seeds an effect takes."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ...console import console
from .config import QUALITIES, CompareConfig
from .folder import Run
from .statistics import MOST_SEEDS, POWER, seeds_needed, smallest_effect
from .tables import table

SEEDS = 2
"""Of a pilot."""
_MARKS = 4
_APART = 1_000_000
"""What its seeds lie above those of the study."""
EFFECTS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Relative differences that a study may look for."""


_Marks = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Spread:
    """How a quality differs between two arms.

    Attributes:
        quality: its key.
        step: after which.
        value: of the baseline, mean over the seeds.
        deviation: standard deviation of the arms' difference over the seeds, in parts of `value`.
    """

    quality: str
    step: int
    value: float
    deviation: float


@dataclass(frozen=True)
class Pilot:
    """What a pilot found.

    Attributes:
        arms: the baseline and the other arm.
        seeds: that the study is to have.
        spreads: by quality and mark.
    """

    arms: tuple[str, str]
    seeds: int
    spreads: tuple[Spread, ...]

    def last(self, quality: str) -> Spread | None:
        """Of a quality at its last mark; None where it was not measured."""
        return next((own for own in reversed(self.spreads) if own.quality == quality), None)


def pilot_config(config: CompareConfig) -> CompareConfig:
    """The pilot of a comparison: baseline and first other arm, for a share of the steps, with seeds of its own."""
    steps = max(1, round(config.pilot * config.train.optim.steps))
    methods = dict(zip((arm.name for arm in config.arms()), config.methods, strict=True))
    other = next(name for name in methods if name != config.baseline)
    optim = dataclasses.replace(
        config.train.optim, steps=steps, warmup_steps=round(config.pilot * config.train.optim.warmup_steps)
    )
    if optim.max_seconds is not None:
        optim = dataclasses.replace(optim, max_seconds=config.pilot * optim.max_seconds)
    marks = min(_MARKS, steps)
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, optim=optim, seed=config.train.seed + _APART),
        methods=(methods[config.baseline], methods[other]),
        seeds=SEEDS,
        marks=marks,
        frechet_every=max(1, marks // 2),
        probe_samples=0,
        pilot=0.0,
    )


def estimate(config: CompareConfig, runs: Sequence[Run], seeds: int) -> Pilot:
    """What the runs of a pilot say of a study of so many `seeds`."""
    base, other = (arm.name for arm in config.arms())
    marks: dict[str, list[_Marks]] = {base: [], other: []}
    for run in runs:
        marks[run.arm].append(run.marks)
    return Pilot((base, other), seeds, tuple(_spreads(marks[base], marks[other])))


def _spreads(base: Sequence[_Marks], other: Sequence[_Marks]) -> Iterator[Spread]:
    for number in range(1, min(len(marks) for marks in (*base, *other))):
        for quality in QUALITIES:
            values = [[marks[number][quality] for marks in runs] for runs in (base, other)]
            if None in values[0] + values[1]:
                continue
            differences = [b - a for a, b in zip(*values, strict=True)]
            value = statistics.fmean(values[0])
            yield Spread(quality, base[0][number]["step"], value, statistics.stdev(differences) / abs(value))


def power_lines(pilot: Pilot) -> list[str]:
    """The lines of a Markdown table: seeds that each effect would take; and what the study's own seeds find."""
    effects = (f"{effect:.0%}" for effect in EFFECTS)
    rows = []
    for own in pilot.spreads:
        smallest = smallest_effect(pilot.seeds, own.deviation)
        rows.append(
            [
                QUALITIES[own.quality],
                str(own.step),
                f"{own.value:.4g}",
                f"{own.deviation:.2%}",
                *_needed(own),
                "nothing" if smallest is None else f"{smallest:.1%}",
            ]
        )
    return table(["quality", "after steps", "baseline", "deviation", *effects, f"{pilot.seeds} seeds find"], rows)


def _needed(own: Spread) -> Iterator[str]:
    """How many seeds each of `EFFECTS` takes."""
    for effect in EFFECTS:
        needed = seeds_needed(effect, own.deviation)
        yield f"> {MOST_SEEDS}" if needed is None else str(needed)


def print_pilot(pilot: Pilot) -> None:
    """Shows on the terminal what effect the study can find."""
    effects = (f"{effect:.0%}" for effect in EFFECTS)
    shown = Table("quality", "after steps", *effects, title="seeds that an effect takes")
    for own in pilot.spreads:
        shown.add_row(QUALITIES[own.quality], str(own.step), *_needed(own))
    console.print(shown)
    for own in filter(None, map(pilot.last, QUALITIES)):
        smallest = smallest_effect(pilot.seeds, own.deviation)
        found = "nothing: one seed has no spread" if smallest is None else f"differences of {smallest:.1%} or more"
        console.print(
            f"{pilot.seeds} seeds find, in {POWER:.0%} of all studies like this one, of the "
            f"{QUALITIES[own.quality]}: {found}"
        )


def uncertainty() -> float:
    """By what factor a standard deviation of `SEEDS` seeds may be too small, at 95 %."""
    from scipy.stats import chi2

    return math.sqrt((SEEDS - 1) / float(chi2.ppf(0.05, SEEDS - 1)))
