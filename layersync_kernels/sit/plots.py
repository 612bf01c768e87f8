"""Pictures of a run: sample grids and loss curves, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .checkpoint import atomic_path
from .data import unit_to_pixels
from .report import QUALITIES, curve

GRID_CELL = 56
"""Smaller samples are enlarged to about this many pixels, so that a digit of 14 pixels can be seen."""


def save_grid(samples: Tensor, path: Path, *, columns: int, latent: bool = False) -> Path:
    """Writes samples (N, C, H, W) as one picture, row by row.

    Args:
        samples: in [-1, 1]. 1 channel is drawn grey, else the first three are red, green and blue.
        path: of the picture.
        columns: samples per row.
        latent: VAE latents: three channels, each stretched over its own range. Not what a decoder would show.
    """
    samples = samples.detach().float().cpu()
    if samples.shape[1] == 2:
        samples = samples[:, :1]
    samples = samples[:, :3]
    if latent:
        low, high = samples.amin((0, 2, 3), keepdim=True), samples.amax((0, 2, 3), keepdim=True)
        samples = (samples - low) / (high - low).clamp_min(1e-6) * 2 - 1
    pixels = unit_to_pixels(samples)
    pixels = pixels.repeat_interleave(factor := max(1, GRID_CELL // pixels.shape[-1]), 2).repeat_interleave(factor, 3)
    count, channels, height, width = pixels.shape
    rows, gap = -(-count // columns), 2
    grid = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 128, dtype=torch.uint8)
    for i, picture in enumerate(pixels):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        grid[:, top : top + height, left : left + width] = picture
    array = grid[0].numpy() if channels == 1 else grid.permute(1, 2, 0).contiguous().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")
    return path


def save_curves(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draws loss and cosine over steps from the records of ``metrics.jsonl``."""
    # Not pyplot: no global state and no display is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, cosine_axes = figure.subplots(1, 2)
    loss_axes.plot([r["step"] for r in records], [r["loss"] for r in records], color="tab:blue")
    loss_axes.set(xlabel="step", ylabel="velocity loss", title="Loss")
    if any(r["loss"] > 0 for r in records):
        loss_axes.set_yscale("log")
    pairs = sorted({pair for r in records for pair in r.get("cosine", {})})
    for pair in pairs:
        with_pair = [r for r in records if pair in r.get("cosine", {})]
        cosine_axes.plot([r["step"] for r in with_pair], [r["cosine"][pair] for r in with_pair], label=pair)
    cosine_axes.set(xlabel="step", ylabel="mean cosine", title="Student to teacher")
    if pairs:
        cosine_axes.legend(title="blocks")
    for axes in (loss_axes, cosine_axes):
        axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def save_probe(report: Mapping[str, Any], path: Path) -> Path:
    """Draws what the blocks of a model know and how alike they are, from the content of ``probe.json``."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    accuracy, (student, teacher), depth = report["accuracy"], report["pair"], report["depth"]
    panels = 2 if accuracy is None else 3
    figure = Figure(figsize=(4.6 * panels, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    *probe_axes, cosine_axes, cka_axes = figure.subplots(1, panels)
    for axes in probe_axes:
        blocks = range(1, depth + 1)
        axes.axvline(student, color="tab:orange", linewidth=7, alpha=0.4, label=f"student: {student}")
        axes.axvline(teacher, color="tab:green", linewidth=7, alpha=0.4, label=f"teacher: {teacher}")
        for i, (t, shares) in enumerate(zip(report["times"], accuracy["per_time"], strict=True), start=1):
            color = colormaps["Blues"](0.3 + 0.6 * i / len(report["times"]))
            axes.plot(blocks, [100 * share for share in shares], color=color, linestyle="--", label=f"t = {t:g}")
        mean, error = ([100 * share for share in accuracy[key]] for key in ("mean", "standard_error"))
        axes.errorbar(blocks, mean, yerr=error, color="black", marker="o", capsize=3, label="mean ± s.e.")
        axes.axhline(100 * accuracy["chance"], color="grey", linestyle=":", label="chance")
        axes.set(xlabel="block", ylabel="held-out accuracy, %", title="Linear probe of the labels")
        axes.set_xlim(0.5, depth + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, fontsize="small")
    for axes, key, title in (
        (cosine_axes, "cosine", "Cosine of equal tokens"),
        (cka_axes, "cka", "Linear CKA of mean tokens"),
    ):
        _draw_similarity(axes, report[key])
        axes.set_title(title)
        axes.add_patch(Rectangle((student - 0.5, teacher - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def save_comparison(report: Mapping[str, Any], path: Path) -> Path:
    """Draws quality against steps and training time, memory and throughput, from the content of ``report.json``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = report["summary"]["methods"]
    colors = {name: f"C{i}" for i, name in enumerate(methods)}
    measured = [q for q in QUALITIES if any(mark[q] is not None for mark in report["runs"][0]["marks"])]
    figure = Figure(figsize=(11, 4.2 * (len(measured) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    *quality_rows, (memory_axes, rate_axes) = figure.subplots(len(measured) + 1, 2)
    for row, quality in zip(quality_rows, measured, strict=True):
        for axes, axis, label in zip(row, ("step", "seconds"), ("step", "training time, s"), strict=True):
            for name, color in colors.items():
                curves = [curve(run, quality, axis) for run in report["runs"] if run["method"] == name]
                _draw_band(axes, curves, color=color, label=name)
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
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def _draw_band(axes: Any, curves: Sequence[tuple[Sequence[float], Sequence[float]]], **style: Any) -> None:
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


def _draw_similarity(axes: Any, matrix: Sequence[Sequence[float]]) -> None:
    depth = len(matrix)
    extent = (0.5, depth + 0.5, 0.5, depth + 0.5)
    low = min(0.99, *(min(row) for row in matrix))  # equal blocks, as before training, have no range of their own
    image = axes.imshow(matrix, origin="lower", extent=extent, vmin=low, vmax=1.0)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set(xlabel="block", ylabel="block")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    if depth > 12:  # the numbers would not fit
        return
    for row, values in enumerate(matrix, start=1):
        for column, value in enumerate(values, start=1):
            color = "black" if image.norm(value) > 0.5 else "white"
            size = 9 if depth <= 8 else 6
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=size)
