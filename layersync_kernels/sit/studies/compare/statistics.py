"""What seeds say: intervals of paired differences, how much sooner a quality is reached, how many seeds it takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...evaluation.metrics import LEVEL

POWER = 0.8
"""How often a study of that size finds the effect."""
MOST_SEEDS = 1000
"""More are not looked for."""
_EXACT = 5
"""Seeds up to which all resamples are taken, and not some at random."""
_RESAMPLES = 10_000

Curve = tuple[Sequence[float], Sequence[float]]
"""Where and what was measured."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and intervals of `LEVEL` about it.

    Attributes:
        mean: over the seeds.
        low, high: of the bootstrap (Efron 1979) over seeds, too narrow for few of them; None with one seed.
        t_low, t_high: of Student's t, which is right for any number of normal differences; None with one seed.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    t_low: float | None = None
    t_high: float | None = None


def resampled(count: int) -> np.ndarray:
    """Which seeds are in each resample: int (B, count), all of them or `_RESAMPLES` of them, always the same ones."""
    if count <= _EXACT:
        return np.array(list(itertools.product(range(count), repeat=count)))
    return np.random.default_rng(0).integers(count, size=(_RESAMPLES, count))


def paired_interval(differences: Sequence[float]) -> Interval:
    """That of the mean of differences, one of each seed."""
    from scipy.stats import t

    values, count = np.asarray(differences, dtype=float), len(differences)
    mean = float(values.mean())
    if count < 2:
        return Interval(mean)
    low, high = (float(edge) for edge in np.quantile(values[resampled(count)].mean(1), _tails()))
    half = float(t.ppf(_tails()[1], count - 1) * values.std(ddof=1) / math.sqrt(count))
    return Interval(mean, low, high, mean - half, mean + half)


def _tails() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2


def first_at(xs: Sequence[float], ys: Sequence[float], target: float) -> float | None:
    """Where the curve first comes down to `target`, straight between the marks; None if it does not."""
    for i, y in enumerate(ys):
        if y <= target:
            if i == 0:
                return xs[0]
            return xs[i - 1] + (xs[i] - xs[i - 1]) * (ys[i - 1] - target) / (ys[i - 1] - y)
    return None


def sooner(own: Curve, base: Curve) -> float | None:
    """How many times sooner a curve first comes to the last value of another one than that itself; None if it does not.

    Where the other one rises again in the end, it has been there before.
    """
    if not base[1]:
        return None
    own_place, base_place = (first_at(*one, base[1][-1]) for one in (own, base))
    return base_place / own_place if own_place and base_place is not None else None


@dataclass(frozen=True)
class Sooner:
    """How many times sooner the last quality of the baseline is reached.

    Attributes:
        value: by the mean curves over the seeds; None: not reached.
        low, high: of resamples of the seeds, curves and baselines together; None at `low`: not reached there.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


def _aligned(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Curves of several seeds at the same places (M,), where all are known: values (S, M)."""
    low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    places = np.unique(np.concatenate([np.asarray(xs, dtype=float) for xs, _ in curves]))
    places = places[(places >= low) & (places <= high)]
    return places, np.array([np.interp(places, *one) for one in curves])


def sooner_interval(own: Sequence[Curve], base: Sequence[Curve]) -> Sooner:
    """Of the curves of each seed, and those of the baseline with the same seeds."""
    sets = [_aligned(curves) for curves in (own, base)]
    if any(len(xs) < 2 for xs, _ in sets):
        return Sooner(None)
    (xs, rows), (base_xs, base_rows) = sets

    def of(seeds: np.ndarray) -> float | None:
        return sooner(
            (xs.tolist(), rows[seeds].mean(0).tolist()), (base_xs.tolist(), base_rows[seeds].mean(0).tolist())
        )

    count = len(own)
    value = of(np.arange(count))
    if count < 2:
        return Sooner(value)
    # What is not reached is less than anything that is.
    values = np.sort([-math.inf if (ratio := of(seeds)) is None else ratio for seeds in resampled(count)])
    last = len(values) - 1
    edges = [float(values[round(q * last)]) for q in _tails()]
    return Sooner(value, *(edge if math.isfinite(edge) else None for edge in edges))


def power(seeds: int, effect: float, deviation: float) -> float:
    """How often a two-sided paired t-test at 1 - `LEVEL` finds an effect.

    Args:
        seeds: runs of each arm, at least 2.
        effect: mean difference of an arm to the baseline.
        deviation: standard deviation of the difference from seed to seed.
    """
    from scipy.stats import nct, t

    if deviation == 0:
        return 1.0
    freedom, shift = seeds - 1, abs(effect) / deviation * math.sqrt(seeds)
    edge = t.ppf(_tails()[1], freedom)
    found = float(nct.sf(edge, freedom, shift) + nct.cdf(-edge, freedom, shift))
    return found if math.isfinite(found) else 1.0  # so far out that the distribution is not evaluated


def least(enough: Callable[[int], bool], most: int) -> int | None:
    """The least number from 2 to `most` from which on `enough` holds; None if it does not at `most`."""
    if not enough(most):
        return None
    low, high = 2, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def seeds_needed(effect: float, deviation: float) -> int | None:
    """Seeds with which such an effect is found in `POWER` of all studies; None: more than `MOST_SEEDS`."""
    return least(lambda seeds: power(seeds, effect, deviation) >= POWER, MOST_SEEDS)


def smallest_effect(seeds: int, deviation: float) -> float | None:
    """The least effect that so many seeds find in `POWER` of all studies; None with one seed."""
    from scipy.optimize import brentq

    if seeds < 2:
        return None
    return deviation * float(brentq(lambda effect: power(seeds, effect, 1.0) - POWER, 1e-3, 1e3)) if deviation else 0.0
