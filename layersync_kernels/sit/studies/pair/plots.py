"""What was measured of one model, or of several beside each other, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import new_figure, save_figure
from .report import clean, noised

Content = Mapping[str, Any]
"""Of a `Report`, as JSON has it."""
_WIDTH, _HEIGHT = 4.3, 4.2


@dataclass(frozen=True)
class _Curve:
    """A quantity of each block.

    Attributes:
        title: above the panel.
        ylabel: at its side.
        values: (times, depth), of a report; None: it has none.
        accuracy: of a report, where the values are such; None: it has none.
    """

    title: str
    ylabel: str
    values: Callable[[Content], list[list[float]] | None]
    accuracy: Callable[[Content], Content | None] = lambda report: None


@dataclass(frozen=True)
class _Matrix:
    """How alike every two blocks are.

    Attributes:
        title: above the panel.
        key: of a report.
        time: which of its times; None: the noised ones.
    """

    title: str
    key: str
    time: int | None = None

    def values(self, report: Content) -> list[list[float]]:
        """(depth, depth)."""
        own: list[list[float]] = report[self.key] if self.time is None else report[f"{self.key}_per_time"][self.time]
        return own


def save_probe(reports: Mapping[str, Content], path: Path) -> Path:
    """Draws what the blocks of each model know and how alike they are, from the content of ``probe.json`` by name.

    Above, each quantity against the block: of one model at each time, of several the mean over the noised times and the
    clean sample. Below, for each model how alike every two blocks are.
    """
    contents, several = list(reports.values()), len(reports) > 1
    curves, matrices = _curves(contents), _matrices(contents)
    heights = [_HEIGHT + 0.6, *[_HEIGHT] * len(reports)]
    figure = new_figure(_WIDTH * max(len(curves), len(matrices)), sum(heights))
    above, *below = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    panels = above.subplots(1, len(curves), squeeze=False)[0]
    for axes, curve in zip(panels, curves, strict=True):
        if several:
            _draw_runs(axes, curve, reports)
        else:
            _draw_times(axes, curve, contents[0])
        axes.set(title=curve.title, ylabel=curve.ylabel)
        axes.grid(alpha=0.3)
    named = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in reversed(named)}  # each of them once
    labels = sorted(handles, key=[label for _, label in named].index)
    above.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=6, fontsize="small")
    # One range for all times and runs; equal blocks, as before training, have none of their own.
    lows: dict[str, float] = {}
    for matrix in matrices:
        lows[matrix.key] = min(lows.get(matrix.key, 0.99), *(min(map(min, matrix.values(own))) for own in contents))
    for row, (name, report) in zip(below, reports.items(), strict=True):
        if several:
            row.suptitle(_plain(name))
        for axes, matrix in zip(row.subplots(1, len(matrices)), matrices, strict=True):
            _draw_similarity(axes, matrix.values(report), lows[matrix.key], report["pair"])
            axes.set_title(matrix.title, fontsize="medium")
    return save_figure(figure, path)


def _curves(reports: Sequence[Content]) -> list[_Curve]:
    """The quantities that any of the models has."""
    shared, first = _depths(reports) == 1, reports[0]["pair"][1]

    def probed(title: str, key: str) -> _Curve:
        def values(report: Content) -> list[list[float]] | None:
            own = report[key]
            return None if own is None else [[100 * share for share in shares] for shares in own["per_time"]]

        return _Curve(title, "held-out accuracy, %", values, lambda report: report[key])

    def cosine(report: Content) -> list[list[float]]:
        block = first if shared else report["pair"][1]
        return [matrix[block - 1] for matrix in report["cosine_per_time"]]

    def cka(report: Content) -> list[list[float]] | None:
        own = report["teacher"]
        return None if own is None else own["cka"]

    to = f"block {first}" if shared else "the own teacher block"
    network = next((report["teacher"]["name"] for report in reports if report["teacher"] is not None), "")
    curves = [
        probed("Linear probe of the labels", "accuracy"),
        probed("Nearest neighbours' labels", "neighbours"),
        _Curve("Effective rank of the tokens", "dimensions", lambda report: report["effective_rank"]),
        _Curve(f"Cosine to {to}", "mean over equal tokens", cosine),
        _Curve(f"Linear CKA to {_plain(network)}", "of mean tokens", cka),
    ]
    return [curve for curve in curves if any(curve.values(report) is not None for report in reports)]


def _matrices(reports: Sequence[Content]) -> list[_Matrix]:
    """The noised times, and the clean one where there is one."""
    titles = {"cosine": "Cosine of equal tokens", "cka": "Linear CKA of mean tokens"}
    at_clean = clean(reports[0]["times"])
    if at_clean is None:
        return [_Matrix(title, key) for key, title in titles.items()]
    both = (("noised", None), ("clean", at_clean))
    return [_Matrix(f"{title}, {what}", key, time) for key, title in titles.items() for what, time in both]


def _draw_times(axes: Any, curve: _Curve, report: Content) -> None:
    """A line for each time, and the mean of the noised ones."""
    from matplotlib import colormaps

    values, times = curve.values(report), report["times"]
    assert values is not None
    at_noise, at_clean, depth = noised(times), clean(times), report["depth"]
    blocks = range(1, depth + 1)
    for block, color, role in zip(report["pair"], ("tab:orange", "tab:green"), ("student", "teacher"), strict=True):
        axes.axvline(block, color=color, linewidth=7, alpha=0.4, label=f"{role}: {block}")
    for turn, i in enumerate(at_noise, start=1):
        blue = colormaps["Blues"](0.3 + 0.6 * turn / len(at_noise))
        axes.plot(blocks, values[i], color=blue, linestyle="--", label=f"t = {times[i]:g}")
    if at_clean is not None:
        axes.plot(blocks, values[at_clean], color="tab:red", marker="s", markersize=4, label="t = 1, clean")
    accuracy = curve.accuracy(report)
    error = None if accuracy is None else [100 * share for share in accuracy["standard_error"]]
    mean = _mean(values, at_noise)
    axes.errorbar(blocks, mean, yerr=error, color="black", marker="o", capsize=3, label="mean of noised, ± s.e.")
    if accuracy is not None:
        axes.axhline(100 * accuracy["chance"], color="grey", linestyle=":", label="chance")
    _number_blocks(axes, depth)


def _draw_runs(axes: Any, curve: _Curve, reports: Mapping[str, Content]) -> None:
    """A colour for each run."""
    fractions = _depths(list(reports.values())) > 1
    for number, (name, report) in enumerate(reports.items()):
        values, at_clean = curve.values(report), clean(report["times"])
        if values is None:
            continue
        depth = report["depth"]
        places = [block / depth if fractions else block for block in range(1, depth + 1)]
        style = {"color": f"C{number % 10}", "markersize": 4}
        label = _plain(name)
        noised_label = label if at_clean is None else f"{label}, noised"
        axes.plot(places, _mean(values, noised(report["times"])), marker="o", label=noised_label, **style)
        if at_clean is not None:
            axes.plot(places, values[at_clean], marker="s", linestyle="--", label=f"{label}, clean", **style)
    if (accuracy := curve.accuracy(next(iter(reports.values())))) is not None:  # of the same samples for all
        axes.axhline(100 * accuracy["chance"], color="grey", linestyle=":", label="chance")
    if fractions:
        axes.set_xlabel("block / depth")
    else:
        _number_blocks(axes, depth)


def _draw_similarity(axes: Any, matrix: Sequence[Sequence[float]], low: float, pair: Sequence[int]) -> None:
    """Draws a matrix of every two blocks from `low` to 1, with its numbers where they fit, and a square at the pair."""
    from matplotlib.patches import Rectangle

    depth = len(matrix)
    extent = (0.5, depth + 0.5, 0.5, depth + 0.5)
    image = axes.imshow(matrix, origin="lower", extent=extent, vmin=low, vmax=1.0)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set(xlabel="block", ylabel="block")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    student, teacher = pair
    axes.add_patch(Rectangle((student - 0.5, teacher - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    if depth > 12:  # the numbers would not fit
        return
    for row, values in enumerate(matrix, start=1):
        for column, value in enumerate(values, start=1):
            color = "black" if image.norm(value) > 0.5 else "white"
            size = 9 if depth <= 8 else 6
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=size)


def _number_blocks(axes: Any, depth: int) -> None:
    axes.set_xlabel("block")
    axes.set_xlim(0.5, depth + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _mean(values: Sequence[Sequence[float]], places: Sequence[int]) -> list[float]:
    """Over the times at these places."""
    return [sum(column) / len(places) for column in zip(*(values[i] for i in places), strict=True)]


def _depths(reports: Sequence[Content]) -> int:
    """How many different ones there are."""
    return len({report["depth"] for report in reports})


def _plain(name: str) -> str:
    """A name as it is, where matplotlib would read a formula or, from an underscore on, a label that is not shown."""
    return name.replace("$", r"\$") if not name.startswith("_") else f" {name}".replace("$", r"\$")
