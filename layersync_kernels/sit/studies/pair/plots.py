"""A probe as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import new_figure, save_figure


def save_probe(report: Mapping[str, Any], path: Path) -> Path:
    """Draws what the blocks of a model know and how alike they are, from the content of ``probe.json``."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    accuracy, (student, teacher), depth = report["accuracy"], report["pair"], report["depth"]
    panels = 2 if accuracy is None else 3
    figure = new_figure(4.6 * panels, 4.8)
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
    return save_figure(figure, path)


def _draw_similarity(axes: Any, matrix: Sequence[Sequence[float]]) -> None:
    """Draws a matrix of every two blocks, with its numbers where they fit."""
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
