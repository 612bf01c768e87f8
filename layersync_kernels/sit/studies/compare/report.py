"""What the measurements of a comparison say: numbers per method, with the spread over the seeds, and their text."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...config.run import TrainConfig
from ...data.base import SampleSet
from ...evaluation.measure import distance_names
from ...evaluation.motion_classifier import CLASSIFIER
from ...evaluation.registry import DEFAULTS
from ...evaluation.report import sampling_facts, sampling_text
from .config import CompareConfig

QUALITIES = {"validation_loss": "validation loss", "frechet": "Fréchet distance"}
"""Key of a measurement to its name; less is better in each."""
_DIGITS = 4
"""Decimals of the validation loss; figures of the least Fréchet distance, which may be 0.4 or 400."""


def curve(run: Mapping[str, Any], quality: str, axis: str) -> tuple[list[float], list[float]]:
    """Where and what was measured: `axis` ("step" or "seconds") and `quality` at the marks that have it."""
    points = [(mark[axis], mark[quality]) for mark in run["marks"] if mark[quality] is not None]
    return [x for x, _ in points], [y for _, y in points]


def value_at(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """The curve at `x`, straight between the marks; None outside of them."""
    if not xs or not xs[0] <= x <= xs[-1]:
        return None
    return float(np.interp(x, xs, ys))


def first_at(xs: Sequence[float], ys: Sequence[float], target: float) -> float | None:
    """Where the curve first comes down to `target`, straight between the marks; None if it does not."""
    for i, y in enumerate(ys):
        if y <= target:
            if i == 0:
                return xs[0]
            return xs[i - 1] + (xs[i] - xs[i - 1]) * (ys[i - 1] - target) / (ys[i - 1] - y)
    return None


def images_per_second(marks: Sequence[Mapping[str, Any]], batch_size: int) -> list[float]:
    """The rate of training from each mark to the next."""
    return [
        batch_size * (after["step"] - before["step"]) / (after["seconds"] - before["seconds"])
        for before, after in itertools.pairwise(marks)
    ]


def summarise(runs: Sequence[Mapping[str, Any]], *, baseline: str, batch_size: int) -> dict[str, Any]:
    """The numbers of a report; lists run over the seeds.

    Args:
        runs: "method", "seed" and "marks" (see `folder.Run`), seed by seed the same methods.
        baseline: the method that the others are compared with.
        batch_size: samples per step.

    Returns:
        "steps" and "seconds", which every run reached; "methods": by name "steps", "seconds", "images_per_second",
        "relative_rate", and by quality "at_steps", "at_seconds", "speedup_steps" and "speedup_seconds".
    """
    steps = min(run["marks"][-1]["step"] for run in runs)
    seconds = min(run["marks"][-1]["seconds"] for run in runs)
    base = {run["seed"]: run for run in runs if run["method"] == baseline}
    methods: dict[str, Any] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        rates = [images_per_second(run["marks"], batch_size) for run in own]
        base_rates = [images_per_second(base[run["seed"]]["marks"], batch_size) for run in own]
        entry: dict[str, Any] = {
            "steps": [run["marks"][-1]["step"] for run in own],
            "seconds": [run["marks"][-1]["seconds"] for run in own],
            "images_per_second": [statistics.median(rate) for rate in rates],
            # slice by slice: both were measured in the same minute
            "relative_rate": [
                statistics.median(a / b for a, b in zip(rate, base_rate, strict=False))
                for rate, base_rate in zip(rates, base_rates, strict=True)
            ],
        }
        shares = [[mark["teacher_share"] for mark in run["marks"] if "teacher_share" in mark] for run in own]
        entry["teacher_share"] = [statistics.fmean(share) if share else None for share in shares]
        for quality in QUALITIES:
            entry[quality] = {
                "at_steps": [value_at(*curve(run, quality, "step"), steps) for run in own],
                "at_seconds": [value_at(*curve(run, quality, "seconds"), seconds) for run in own],
                "speedup_steps": [_speedup(run, base[run["seed"]], quality, "step") for run in own],
                "speedup_seconds": [_speedup(run, base[run["seed"]], quality, "seconds") for run in own],
            }
        methods[method] = entry
    return {"steps": steps, "seconds": seconds, "methods": methods}


def _speedup(run: Mapping[str, Any], base: Mapping[str, Any], quality: str, axis: str) -> float | None:
    """How many times sooner `run` comes to the last quality of `base`; None if it does not."""
    base_x, base_y = curve(base, quality, axis)
    x = first_at(*curve(run, quality, axis), base_y[-1]) if base_y else None
    return None if not x else base_x[-1] / x


def markdown(report: Mapping[str, Any], picture: str) -> str:
    """The text of a report.

    Args:
        report: the content of ``report.json``.
        picture: address of the picture.
    """
    summary, seeds, baseline = report["summary"], report["seeds"], report["baseline"]
    methods = summary["methods"]
    measured = [q for q in QUALITIES if any(m[q]["at_steps"][0] is not None for m in methods.values())]
    decimals = {"validation_loss": _DIGITS, "frechet": _decimals(report["runs"])}
    lines = [f"# {', '.join(methods)} compared", "", report["subject"], ""]
    lines += [f"{len(seeds)} seeds: each number is the mean over them, with the least and the greatest in brackets."]
    if len(seeds) == 1:
        lines[-1] = "One seed: there is no spread, and nothing here tells a difference from chance."
    lines += ["", f"![curves]({picture})", "", "## Cost", ""]
    lines += _table(
        ["method", "steps", "training s", "images/s", f"x {baseline}", "peak memory, MB", "teacher's share of a step"],
        [
            [
                name,
                _spread(entry["steps"], 0),
                _spread(entry["seconds"], 1),
                _spread(entry["images_per_second"], 1),
                _spread(entry["relative_rate"], 3),
                "not measured" if report["memory"][name] is None else f"{report['memory'][name] / 1e6:.0f}",
                _spread(entry["teacher_share"], 3),
            ]
            for name, entry in methods.items()
        ],
    )
    for title, key in (
        (f"After {summary['steps']} steps", "at_steps"),
        (f"After {summary['seconds']:.1f} s of training", "at_seconds"),
    ):
        lines += ["", f"## {title}", ""]
        rows = [[name, *(_spread(entry[q][key], decimals[q]) for q in measured)] for name, entry in methods.items()]
        lines += _table(["method", *(QUALITIES[q] for q in measured)], rows)
    others = {name: entry for name, entry in methods.items() if name != baseline}
    followed = [q for q in measured if all(len(curve(run, q, "step")[0]) > 1 for run in report["runs"])]
    lines += ["", f"## Sooner at the last quality of {baseline}", ""]
    lines += _table(
        ["method", "quality", "fewer steps", "less time"],
        [
            [name, QUALITIES[q], *(_reached(entry[q][key]) for key in ("speedup_steps", "speedup_seconds"))]
            for name, entry in others.items()
            for q in followed
        ],
    )
    lines += ["", f"## Difference to {baseline}, seed by seed", "", "Less than 0 is better than it.", ""]
    lines += _table(
        ["method", "quality", "after equal", *(f"seed {seed}" for seed in seeds), "mean", "better in"],
        [
            [name, QUALITIES[q], axis, *_differences(entry[q][key], methods[baseline][q][key], decimals[q])]
            for name, entry in others.items()
            for q in measured
            for axis, key in (("steps", "at_steps"), ("seconds", "at_seconds"))
            if axis == "steps" or q in followed
        ],
    )
    lines += ["", "## How it was measured", ""]
    lines += [f"- {note}" for note in report["notes"]]
    return "\n".join(lines) + "\n"


def describe(train: TrainConfig, data: SampleSet, device: torch.device) -> str:
    """A sentence on what was trained on what."""
    model, optim = train.model, train.optim
    sizes = {"width": model.hidden_size, "depth": model.depth, "patch": model.patch_size}
    own = "".join(f", {name} {value}" for name, value in sizes.items() if value is not None)
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    return (
        f"{model.model}{own}; {len(data)} samples of {data.spec} from {train.data.data}; "
        f"batches of {optim.batch_size}, learning rate {optim.lr:g} ({optim.lr_schedule}); "
        f"{device}{threads}, PyTorch {torch.__version__}."
    )


def notes(
    config: CompareConfig,
    runs: Sequence[Mapping[str, Any]],
    device: torch.device,
    *,
    kind: str,
    trained: int,
    held_out: int,
) -> list[str]:
    """What a reader has to know to judge the numbers.

    Args:
        config: what was compared.
        runs: as for `summarise`.
        device: where.
        kind: of the samples, see `kind_of`.
        trained: samples that the runs were trained on.
        held_out: samples behind the validation loss.
    """
    train = config.train
    found = [
        "Runs of one seed start from the same weights and see the same samples, noise and times in the same order. "
        "They take turns from mark to mark, in alternating order. Training time is theirs alone: measuring, saving "
        "and the warm-up after loading are not on the clock.",
        f"Quality is that of the averaged weights, at {config.marks + 1} marks; between marks it is read off a "
        "straight line, and the earliest moment that counts as reached is the first mark.",
        f"Validation loss: the training loss without alignment on {held_out} samples that no run has seen, with the "
        "same noise and evenly spread times for all.",
        "Peak memory: what training takes beyond what the process had before it, "
        + ("as CUDA's allocator counts it" if device.type == "cuda" else "in resident pages")
        + ", over a few steps in a process of its own.",
    ]
    judge = DEFAULTS[kind] if config.quality_network == "auto" else config.quality_network
    if judge != "none":
        last = runs[0]["marks"][-1]
        count, floor = min(held_out, config.samples), last["frechet_floor"]
        others = "held-out ones are too few for that" if floor is None else f"held-out ones are at {floor:.{_DIGITS}g}"
        known = last.get("frechet_dimensions")  # runs of before this was kept have none
        within = "principal directions" if known is None else f"first {known} principal directions"
        made = ", which was trained on the training set to name actions" if judge == CLASSIFIER else ""
        found.append(
            f"Fréchet distance ({distance_names(kind, judge)['features']}): {config.samples} samples, drawn by "
            f"{sampling_text(sampling_facts(train.sampling))}, from the same noise for all, against "
            f"{min(config.reference, trained)} of the training set, in the {within} of the averaged features of "
            f"{judge}{made}; {count} {others}. Published distances are of another network and more samples."
        )
    name = next((run["marks"][-1]["teacher"] for run in runs if "teacher" in run["marks"][-1]), None)
    if name is not None:
        clock = "computing its features is not on the clock" if train.align.features else "it runs in every step"
        found.append(
            f"repa and both learn from {name}, pretrained on other data; what that took is not on the clock, and "
            f"{clock}."
        )
        if judge == name:
            found.append(
                f"{name} is also the network that judges the samples: that favours the runs which learn from it. "
                "Their validation loss is free of this."
            )
    if config.seeds > 1:
        found.append(
            f"The brackets are the range of {config.seeds} seeds, not a confidence interval; differences inside of "
            "them say nothing."
        )
    if train.optim.lr_schedule != "constant":
        found.append(
            f"The learning rate falls over the steps ({train.optim.lr_schedule}): readings before the end, such as "
            "those after equal seconds, are of runs that have not finished their schedule."
        )
    return found


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _spread(values: Sequence[float | None], digits: int) -> str:
    """The mean over the seeds, and their range where they differ; "-" where one is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "-"
    mean, low, high = (f"{v:.{digits}f}" for v in (statistics.fmean(known), min(known), max(known)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _decimals(runs: Sequence[Mapping[str, Any]]) -> int:
    """With which the least Fréchet distance of the runs has `_DIGITS` figures."""
    found = [y for run in runs for y in curve(run, "frechet", "step")[1] if y > 0]
    return max(0, _DIGITS - 1 - math.floor(math.log10(min(found)))) if found else 0


def _reached(ratios: Sequence[float | None]) -> str:
    """The mean ratio over the seeds that came to the quality, and how many did."""
    reached = [ratio for ratio in ratios if ratio is not None]
    if not reached:
        return "not reached"
    text = _spread(reached, 2).replace(" (", "x (")
    text = text if "(" in text else f"{text}x"
    return text if len(reached) == len(ratios) else f"{text}; {len(reached)} of {len(ratios)} seeds, else not reached"


def _differences(own: Sequence[float | None], base: Sequence[float | None], digits: int) -> list[str]:
    """Cells: the difference in each seed, their mean, and in how many of them it is less than 0."""
    differences = [None if a is None or b is None else a - b for a, b in zip(own, base, strict=True)]
    known = [d for d in differences if d is not None]
    cells = ["-" if d is None else f"{d:+.{digits}f}" for d in differences]
    mean = f"{statistics.fmean(known):+.{digits}f}" if known else "-"
    return [*cells, mean, f"{sum(d < 0 for d in known)} of {len(known)}"]
