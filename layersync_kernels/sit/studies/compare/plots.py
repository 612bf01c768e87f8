"""A comparison as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files import new_figure, plain_ticks, save_figure
from .report import QUALITIES, curve


def save_comparison(report: Mapping[str, Any], path: Path) -> Path:
    """Draws quality against steps and training time, memory and throughput, from the content of ``report.json``."""
    methods = report["summary"]["methods"]
    colors = {name: f"C{i}" for i, name in enumerate(methods)}
    measured = [q for q in QUALITIES if any(mark[q] is not None for mark in report["runs"][0]["marks"])]
    figure = new_figure(11, 4.2 * (len(measured) + 1))
    *quality_rows, (memory_axes, rate_axes) = figure.subplots(len(measured) + 1, 2)
    for row, quality in zip(quality_rows, measured, strict=True):
        for axes, axis, label in zip(row, ("step", "seconds"), ("step", "training time, s"), strict=True):
            for name, color in colors.items():
                curves = [curve(run, quality, axis) for run in report["runs"] if run["method"] == name]
                draw_band(axes, curves, color=color, label=name)
            axes.set(xlabel=label, ylabel=QUALITIES[quality], title=f"{QUALITIES[quality].capitalize()} by {label}")
            axes.grid(alpha=0.3)
            axes.legend(title=f"mean and range, {len(report['seeds'])} seed(s)", loc="best")
    known = {name: size for name in methods if (size := report["memory"][name]) is not None}
    memory_axes.bar(list(known), [size / 1e6 for size in known.values()], color=[colors[name] for name in known])
    memory_axes.set(ylabel="MB", title="Peak memory")
    rates = {name: entry["images_per_second"] for name, entry in methods.items()}
    means = {name: sum(values) / len(values) for name, values in rates.items()}
    spread = [[means[n] - min(v) for n, v in rates.items()], [max(v) - means[n] for n, v in rates.items()]]
    rate_axes.bar(list(means), list(means.values()), yerr=spread, capsize=4, color=list(colors.values()))
    rate_axes.set(ylabel="images/s", title="Throughput")
    for axes in figure.axes:
        plain_ticks(axes.yaxis)
    for row in quality_rows:
        for axes in row:
            plain_ticks(axes.xaxis)
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
