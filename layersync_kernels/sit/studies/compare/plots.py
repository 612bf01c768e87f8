"""A comparison as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files import new_figure, plain_ticks, save_figure
from .config import QUALITIES
from .summary import curve


def save_comparison(report: Mapping[str, Any], path: Path) -> Path:
    """Draws quality by step and training time, what blocks know, and cost, from the content of ``report.json``."""
    arms = report["summary"]["arms"]
    colors = {name: f"C{i}" for i, name in enumerate(arms)}
    measured = [q for q in QUALITIES if any(mark[q] is not None for mark in report["runs"][0]["marks"])]
    with_blocks = all(entry["blocks"] is not None for entry in arms.values())
    rows = len(measured) + with_blocks + 2
    figure = new_figure(11, 4.2 * rows)
    grid = figure.subplots(rows, 2)
    others = [name for name in arms if name != report["baseline"]]
    for axes, axis in zip(grid[0], ("steps", "seconds"), strict=True):
        found = {name: arms[name][report["primary"]][f"difference_{axis}"] for name in others}
        _draw_differences(axes, found, colors)
        axes.set(
            xlabel=f"{QUALITIES[report['primary']]}, difference to {report['baseline']}; left is better",
            title=f"After equal {axis}: seeds, mean, 95 % interval of t",
        )
    for row, quality in zip(grid[1:], measured, strict=False):
        for axes, axis, label in zip(row, ("step", "seconds"), ("step", "training time, s"), strict=True):
            for name, color in colors.items():
                curves = [curve(run, quality, axis) for run in report["runs"] if run["arm"] == name]
                draw_band(axes, curves, color=color, label=name)
            axes.set(xlabel=label, ylabel=QUALITIES[quality], title=f"{QUALITIES[quality].capitalize()} by {label}")
            axes.legend(title=f"mean and range, {len(report['seeds'])} seed(s)", loc="best", fontsize="small")
            plain_ticks(axes.xaxis)
    if with_blocks:
        _draw_blocks(grid[-2], report, colors)
    memory_axes, rate_axes = grid[-1]
    known = {name: [size / 1e6] for name in arms if (size := report["memory"][name]) is not None}
    _draw_costs(memory_axes, known, colors)
    memory_axes.set(xlabel="MB", title="Peak memory")
    _draw_costs(rate_axes, {name: entry["relative_rate"] for name, entry in arms.items()}, colors)
    rate_axes.set(xlabel=f"samples per second, in those of {report['baseline']}", title="Throughput")
    for axes in (*grid[0], memory_axes, rate_axes):
        plain_ticks(axes.xaxis)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    for axes in (own for row in grid[1:-1] for own in row):
        plain_ticks(axes.yaxis)
    return save_figure(figure, path)


def draw_band(axes: Any, curves: Sequence[tuple[Sequence[float], Sequence[float]]], **style: Any) -> None:
    """The mean of curves (xs, ys) and the band from the least to the greatest, over where all of them are known."""
    if any(len(xs) < 2 for xs, _ in curves):  # no curves, but a point of each seed
        points = np.array([(x, y) for one in curves for x, y in zip(*one, strict=True)])
        axes.plot(*points.T, **style, marker="o", markersize=5, linestyle="none")
        return
    # What is measured before training would hide the rest.
    curves = [(xs[1:], ys[1:]) if xs[0] == 0 and len(xs) > 2 else (xs, ys) for xs, ys in curves]
    low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    xs = np.unique([low, high, *(x for own, _ in curves for x in own if low <= x <= high)])
    values = np.array([np.interp(xs, *one) for one in curves])
    axes.plot(xs, values.mean(0), **style, marker="o", markersize=3)
    axes.fill_between(xs, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)


def _draw_blocks(row: Sequence[Any], report: Mapping[str, Any], colors: Mapping[str, str]) -> None:
    """What the blocks know, and how many directions their tokens have; dotted: before training."""
    probe_axes, rank_axes = row
    for name, color in colors.items():
        ends = [[run["marks"][i]["blocks"] for run in report["runs"] if run["arm"] == name] for i in (0, -1)]
        for axes, of in ((probe_axes, _probe), (rank_axes, _rank)):
            for blocks, style, label in zip(ends, (":", "-"), (None, name), strict=True):
                values = [of(own) for own in blocks]
                if any(own is None for own in values):
                    continue
                mean = np.mean(values, axis=0)
                numbers = range(1, len(mean) + 1)
                if style == "-" or name == report["baseline"]:  # all start alike
                    axes.plot(numbers, mean, color=color, linestyle=style, marker="o", markersize=3, label=label)
                if style == "-":
                    axes.fill_between(numbers, np.min(values, axis=0), np.max(values, axis=0), color=color, alpha=0.2)
    probe_axes.set(xlabel="block", ylabel="held-out accuracy, %", title="Linear probe, mean over the noised times")
    rank_axes.set(xlabel="block", ylabel="effective rank", title="Effective rank of tokens, mean over the times")
    for axes in row:
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend(title="dotted: before training", fontsize="small")


def _probe(blocks: Mapping[str, Any]) -> Any:
    return None if blocks["accuracy"] is None else 100 * np.asarray(blocks["accuracy"]["mean"])


def _rank(blocks: Mapping[str, Any]) -> Any:
    return np.mean(blocks["effective_rank"], axis=0)


def _draw_differences(axes: Any, found: Mapping[str, Any], colors: Mapping[str, str]) -> None:
    """A point for each seed, and the mean with its interval."""
    axes.axvline(0, color="grey", linewidth=1)
    for place, (name, difference) in enumerate(found.items()):
        if difference is None:
            continue
        axes.plot(difference["seeds"], [place] * len(difference["seeds"]), "o", color=colors[name], alpha=0.5)
        axes.plot(difference["mean"], place, "D", color=colors[name])
        if difference["t_low"] is not None:
            axes.hlines(place, difference["t_low"], difference["t_high"], color=colors[name])
    _name_rows(axes, list(found))


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)


def _draw_costs(axes: Any, values: Mapping[str, Sequence[float]], colors: Mapping[str, str]) -> None:
    """A point for the mean of each arm, and a line over the range of its seeds: where differences are, not from 0."""
    for place, (name, own) in enumerate(values.items()):
        axes.hlines(place, min(own), max(own), color=colors[name], linewidth=3, alpha=0.4)
        axes.plot(sum(own) / len(own), place, "o", color=colors[name])
    _name_rows(axes, list(values))
