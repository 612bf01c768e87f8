"""The text of a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...evaluation.measure import distance_names
from ...evaluation.metrics import LEVEL
from ...evaluation.motion_classifier import CLASSIFIER
from ...evaluation.registry import DEFAULTS
from ...evaluation.report import sampling_facts, sampling_text
from .config import QUALITIES, CompareConfig
from .summary import BLOCKS, curve
from .tables import table

_DIGITS = 4
"""Decimals of the validation loss; figures of the least Fréchet distance, which may be 0.4 or 400."""


def verdict(difference: Mapping[str, Any] | None) -> str:
    """What the plan's rule makes of the difference of the number that decides."""
    if difference is None:
        return "not measured"
    if difference["t_low"] is None:
        return "does not tell (one seed)"
    if max(difference["seeds"]) < 0 and difference["t_high"] < 0:
        return "better"
    if min(difference["seeds"]) > 0 and difference["t_low"] > 0:
        return "worse"
    return "does not tell"


def markdown(report: Mapping[str, Any], picture: str) -> str:
    """The text of a report.

    Args:
        report: the content of ``report.json``.
        picture: address of the picture.
    """
    summary, seeds, baseline = report["summary"], report["seeds"], report["baseline"]
    arms = summary["arms"]
    others = {name: entry for name, entry in arms.items() if name != baseline}
    measured = [q for q in QUALITIES if any(entry[q]["at_steps"][0] is not None for entry in arms.values())]
    deciding = report["primary"]
    decimals = {"validation_loss": _DIGITS, "frechet": _decimals(report["runs"])}
    lines = [f"# {', '.join(arms)} compared", "", "## What came of it", ""]
    lines += table(
        ["arm", f"{QUALITIES[deciding]}, to {baseline}'s", f"{LEVEL:.0%}, t", "so it is", "sooner at that quality"],
        [
            [
                name,
                _mean(entry[deciding]["difference_steps"], decimals[deciding]),
                _edges(entry[deciding]["difference_steps"], "t_", decimals[deciding]),
                f"**{verdict(entry[deciding]['difference_steps'])}**",
                _sooner(entry[deciding]["sooner_steps"]),
            ]
            for name, entry in others.items()
        ],
    )
    lines += ["", f"![curves]({picture})", "", report["plan"].strip(), "", "## Cost", ""]
    lines += [f"{len(seeds)} seeds: each number is the mean over them, with the least and the greatest in brackets."]
    if len(seeds) == 1:
        lines[-1] = "One seed: there is no spread, and nothing here tells a difference from chance."
    lines += ["", *_cost(report)]
    for title, key in (
        (f"After {summary['steps']} steps", "at_steps"),
        (f"After {summary['seconds']:.1f} s of training", "at_seconds"),
    ):
        lines += ["", f"## {title}", ""]
        rows = [[name, *(_spread(entry[q][key], decimals[q]) for q in measured)] for name, entry in arms.items()]
        lines += table(["arm", *(QUALITIES[q] for q in measured)], rows)
    followed = [q for q in measured if all(len(curve(run, q, "step")[0]) > 1 for run in report["runs"])]
    lines += ["", f"## Sooner at the last quality of {baseline}", ""]
    lines += ["By the mean curves, with the interval of a bootstrap over seeds; and how many seeds reach it.", ""]
    lines += table(
        ["arm", "quality", "fewer steps", "seeds", "less time", "seeds"],
        [
            [name, QUALITIES[q], *(cell for axis in ("steps", "seconds") for cell in _reached(entry[q], axis))]
            for name, entry in others.items()
            for q in followed
        ],
    )
    lines += ["", f"## Difference to {baseline}, seed by seed", "", "Less than 0 is better than it.", ""]
    lines += table(
        ["arm", "quality", "after equal", *(f"seed {seed}" for seed in seeds), "mean", "bootstrap", "t", "better in"],
        [
            [name, QUALITIES[q], axis, *_differences(entry[q][f"difference_{axis}"], decimals[q], len(seeds))]
            for name, entry in others.items()
            for q in measured
            for axis in ("steps", "seconds")
            if axis == "steps" or q in followed
        ],
    )
    lines += _block_lines(report)
    lines += ["", "## How it was measured", ""]
    lines += [f"- {note}" for note in report["notes"]]
    return "\n".join(lines) + "\n"


def _cost(report: Mapping[str, Any]) -> list[str]:
    return table(
        ["arm", "steps", "training s", "samples/s", f"x {report['baseline']}", "peak memory, MB", "teacher's share"],
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
            for name, entry in report["summary"]["arms"].items()
        ],
    )


def _block_lines(report: Mapping[str, Any]) -> list[str]:
    """What the blocks know, before and after."""
    arms, baseline = report["summary"]["arms"], report["baseline"]
    if any(entry["blocks"] is None for entry in arms.values()):
        return []
    lines = ["", "## The blocks, before and after", ""]
    lines += table(
        ["of the blocks", "arm", "start", "end", f"end, to {baseline}'s", "bootstrap", "t"],
        [
            [
                BLOCKS[name],
                arm,
                _spread(entry["blocks"][name]["start"], 1),
                _spread(entry["blocks"][name]["end"], 1),
                *(
                    ["", "", ""]
                    if arm == baseline
                    else [
                        _signed(entry["blocks"][name]["difference"]["mean"], 2),
                        *(_edges(entry["blocks"][name]["difference"], kind, 2) for kind in ("", "t_")),
                    ]
                ),
            ]
            for name in BLOCKS
            for arm, entry in arms.items()
            if name in entry["blocks"]
        ],
    )
    if "probe" in arms[baseline]["blocks"]:
        lines += ["", f"Linear probe of each block at the end, %; in brackets the difference to {baseline}'s:", ""]
        probes = {arm: np.mean(entry["blocks"]["probe"]["each"], axis=0) for arm, entry in arms.items()}
        base = probes[baseline]
        rows = [[baseline, *(f"{share:.1f}" for share in base)]]
        for arm in (name for name in arms if name != baseline):
            rows.append([arm, *(f"{a:.1f} ({a - b:+.1f})" for a, b in zip(probes[arm], base, strict=True))])
        lines += table(["arm", *map(str, range(1, len(base) + 1))], rows)
    pairs = sorted({pair for own in report["pairs"].values() for pair in own if ":" in pair}, key=_numbers)
    if pairs:
        lines += ["", "Cosine of equal tokens of each pair, averaged over the times and seeds:", ""]
        rows = []
        for arm in arms:
            runs = [run for run in report["runs"] if run["arm"] == arm]
            cells = []
            for pair in pairs:
                student, teacher = _numbers(pair)
                ends = [
                    statistics.fmean(run["marks"][i]["blocks"]["cosine"][student - 1][teacher - 1] for run in runs)
                    for i in (0, -1)
                ]
                cells.append(f"{ends[0]:.3f} to {ends[1]:.3f}" + (" (aligned)" if pair in report["pairs"][arm] else ""))
            rows.append([arm, *cells])
        lines += table(["arm", *pairs], rows)
    return lines


def _numbers(pair: str) -> tuple[int, int]:
    student, teacher = pair.split(":")
    return int(student), int(teacher)


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
    taught = [run for run in runs if "teacher" in run["marks"][-1]]
    name = taught[0]["marks"][-1]["teacher"] if taught else None
    if name is not None:
        arms = " and ".join(dict.fromkeys(run["arm"] for run in taught))
        clock = "computing its features is not on the clock" if train.align.features else "it runs in every step"
        found.append(
            f"{arms} learn from {name}, pretrained on other data; what that took is not on the clock, and {clock}."
        )
        if judge == name:
            found.append(
                f"{name} is also the network that judges the samples: that favours the runs which learn from it. "
                "Their validation loss is free of this."
            )
    if config.seeds > 1:
        found.append(
            f"Brackets with two numbers are the range of {config.seeds} seeds. Intervals are of {LEVEL:.0%}: "
            "bootstrap, over resamples of the seeds, which is too narrow for few of them; and t, Student's, which is "
            "right for any number of normal differences."
        )
    if train.optim.lr_schedule != "constant":
        found.append(
            f"The learning rate falls over the steps ({train.optim.lr_schedule}): readings before the end, such as "
            "those after equal seconds, are of runs that have not finished their schedule."
        )
    return found


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


def _reached(entry: Mapping[str, Any], axis: str) -> list[str]:
    """Cells: how many times sooner, and in how many seeds at all."""
    ratios = entry[f"speedup_{axis}"]
    return [_sooner(entry[f"sooner_{axis}"]), f"{sum(ratio is not None for ratio in ratios)} of {len(ratios)}"]


def _sooner(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found["value"] is None:
        return "not reached" if found["high"] is None else f"not reached (to {found['high']:.2f}x)"
    low = "not reached" if found["low"] is None else f"{found['low']:.2f}"
    return f"{found['value']:.2f}x" + ("" if found["high"] is None else f" ({low} to {found['high']:.2f})")


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}"


def _mean(difference: Mapping[str, Any] | None, digits: int) -> str:
    return "-" if difference is None else _signed(difference["mean"], digits)


def _edges(difference: Mapping[str, Any] | None, kind: str, digits: int) -> str:
    """An interval: `kind` "t_" of Student, "" of the bootstrap."""
    if difference is None or difference[f"{kind}low"] is None:
        return "-"
    return f"{_signed(difference[f'{kind}low'], digits)} to {_signed(difference[f'{kind}high'], digits)}"


def _differences(difference: Mapping[str, Any] | None, digits: int, seeds: int) -> list[str]:
    """Cells: the difference in each seed, their mean, its intervals, and in how many seeds it is less than 0."""
    if difference is None:
        return ["-"] * (seeds + 4)
    own = difference["seeds"]
    return [
        *(_signed(value, digits) for value in own),
        _mean(difference, digits),
        _edges(difference, "", digits),
        _edges(difference, "t_", digits),
        f"{sum(value < 0 for value in own)} of {len(own)}",
    ]
