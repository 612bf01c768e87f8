"""What the measurements of a comparison say: numbers of each arm, with the spread over the seeds."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .config import QUALITIES
from .statistics import paired_interval, sooner, sooner_interval


def curve(run: Mapping[str, Any], quality: str, axis: str) -> tuple[list[float], list[float]]:
    """Where and what was measured: `axis` ("step" or "seconds") and `quality` at the marks that have it."""
    points = [(mark[axis], mark[quality]) for mark in run["marks"] if mark[quality] is not None]
    return [x for x, _ in points], [y for _, y in points]


def value_at(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """The curve at `x`, straight between the marks; None outside of them."""
    if not xs or not xs[0] <= x <= xs[-1]:
        return None
    return float(np.interp(x, xs, ys))


def images_per_second(marks: Sequence[Mapping[str, Any]], batch_size: int) -> list[float]:
    """The rate of training from each mark to the next."""
    return [
        batch_size * (after["step"] - before["step"]) / (after["seconds"] - before["seconds"])
        for before, after in itertools.pairwise(marks)
    ]


def summarise(runs: Sequence[Mapping[str, Any]], *, baseline: str, batch_size: int) -> dict[str, Any]:
    """The numbers of a report; lists run over the seeds.

    Args:
        runs: "arm", "seed" and "marks" (see `folder.Run`), seed by seed the same arms.
        baseline: the arm that the others are compared with.
        batch_size: samples per step.

    Returns:
        "steps" and "seconds", which every run reached; "arms": by name "steps", "seconds", "images_per_second",
        "relative_rate", "teacher_share", "blocks" (see `_blocks`), and by quality "at_steps", "at_seconds", their
        "difference_steps" and "difference_seconds" to the baseline (`Interval`), "speedup_steps" and
        "speedup_seconds" of each seed, and those of the mean curves, "sooner_steps" and "sooner_seconds" (`Sooner`).
    """
    steps = min(run["marks"][-1]["step"] for run in runs)
    seconds = min(run["marks"][-1]["seconds"] for run in runs)
    base = [run for run in runs if run["arm"] == baseline]
    summary: dict[str, Any] = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        rates, base_rates = ([images_per_second(run["marks"], batch_size) for run in group] for group in (own, base))
        shares = [[mark["teacher_share"] for mark in run["marks"] if "teacher_share" in mark] for run in own]
        entry: dict[str, Any] = {
            "steps": [run["marks"][-1]["step"] for run in own],
            "seconds": [run["marks"][-1]["seconds"] for run in own],
            "images_per_second": [statistics.median(rate) for rate in rates],
            # slice by slice: both were measured in the same minute
            "relative_rate": [
                statistics.median(a / b for a, b in zip(rate, base_rate, strict=False))
                for rate, base_rate in zip(rates, base_rates, strict=True)
            ],
            "teacher_share": [statistics.fmean(share) if share else None for share in shares],
            "blocks": _blocks(own, base),
        }
        for quality in QUALITIES:
            entry[quality] = _quality(own, base, quality, {"steps": steps, "seconds": seconds})
        summary[arm] = entry
    return {"steps": steps, "seconds": seconds, "arms": summary}


def _quality(
    own: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], quality: str, ends: Mapping[str, float]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, end in ends.items():
        axis = name.removesuffix("s") if name == "steps" else name
        curves, base_curves = ([curve(run, quality, axis) for run in group] for group in (own, base))
        values, base_values = ([value_at(*one, end) for one in group] for group in (curves, base_curves))
        found[f"at_{name}"] = values
        found[f"difference_{name}"] = _difference(values, base_values)
        found[f"speedup_{name}"] = [sooner(*both) for both in zip(curves, base_curves, strict=True)]
        known = all(len(xs) > 1 for xs, _ in (*curves, *base_curves))
        found[f"sooner_{name}"] = dataclasses.asdict(sooner_interval(curves, base_curves)) if known else None
    return found


def _difference(own: Sequence[float | None], base: Sequence[float | None]) -> dict[str, Any] | None:
    differences = [None if a is None or b is None else a - b for a, b in zip(own, base, strict=True)]
    known = [value for value in differences if value is not None]
    if len(known) < len(differences):
        return None
    return {"seeds": known, **dataclasses.asdict(paired_interval(known))}


BLOCKS = {
    "probe": "linear probe, mean over blocks, %",
    "best": "linear probe, best block, %",
    "neighbours": "k-NN, mean over blocks, %",
    "rank": "effective rank of tokens, mean over blocks",
}
"""What is told of the blocks, by name; all over the times, too."""


def _blocks(own: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """By name in `BLOCKS` "start", "end" (lists over the seeds) and "difference" at the end (`Interval`).

    Of "probe" also "each": of each seed and block, at the end.
    """
    if any(mark.get("blocks") is None for run in (*own, *base) for mark in (run["marks"][0], run["marks"][-1])):
        return None
    found: dict[str, dict[str, Any]] = {}
    for name in BLOCKS:
        start, end = ([_of_blocks(run["marks"][i]["blocks"], name) for run in own] for i in (0, -1))
        base_end = [_of_blocks(run["marks"][-1]["blocks"], name) for run in base]
        if None not in start + end + base_end:
            found[name] = {"start": start, "end": end, "difference": _difference(end, base_end)}
    if "probe" in found:
        found["probe"]["each"] = [
            [100 * share for share in run["marks"][-1]["blocks"]["accuracy"]["mean"]] for run in own
        ]
    return found


def _of_blocks(blocks: Mapping[str, Any], name: str) -> float | None:
    if name == "rank":
        return float(np.mean(blocks["effective_rank"]))
    measured = blocks["neighbours" if name == "neighbours" else "accuracy"]
    if measured is None:
        return None
    return 100 * float(max(measured["mean"]) if name == "best" else np.mean(measured["mean"]))
