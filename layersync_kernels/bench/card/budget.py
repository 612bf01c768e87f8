"""How long a stage takes on a card where nobody has run it: what it compiles, counted, times what that takes here.

The seconds of a compilation are CPU seconds of whatever machine `--measure-compile` ran on (benchmarks/card.json says
which); what nobody has measured is in `ASSUMED`. An estimate is a prediction, and what limits are made of.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..cases import OPS, Case

FIGURES = Path(__file__).resolve().parents[3] / "benchmarks" / "card.json"
BUDGET = 540.0
"""Seconds of all stages together."""

ASSUMED = {
    "bytes_per_s": 2e12,  # an H100's memory, less what a kernel leaves unused
    "flops_per_s": 3e14,  # of half-precision products; a third of the peak
    "open_card_s": 4.0,  # a process's first call of CUDA
    "launch_s": 1e-3,  # a timed call with its events and the pause that hides the launch
    "sanitizer_s": 35.0,  # compute-sanitizer on the exercise, with its start
    "training_step_s": 0.25,  # of SiT-XL/2, batch 64
    "build_model_s": 8.0,  # of that size, on the CPU, then to the card
    "tuning_s": 60.0,  # `layersync tune --quick`, with its start
}


@dataclass(frozen=True)
class Work:
    """What a stage does.

    Attributes:
        processes: that import torch and open the card, one after the other.
        triton: "op.kernel" to the specialisations that are compiled.
        graphs: formulas that torch.compile compiles, forward and backward.
        build: whether the extension is built.
        tests: how many run.
        collects: whether pytest collects all of tests/.
        workers: processes that share tests and their compilations.
        seconds: computed by the card, or otherwise not compiled.
    """

    processes: int = 1
    triton: Mapping[str, int] = field(default_factory=dict)
    graphs: int = 0
    build: bool = False
    tests: int = 0
    collects: bool = False
    workers: int = 1
    seconds: float = 0.0


def load_figures(path: Path = FIGURES) -> dict[str, Any]:
    """What `--measure-compile` has written.

    Raises:
        UserError: the file is missing or not of that kind.
    """
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        seconds = figures["seconds"]
        assert isinstance(figures["tests"], dict)
        assert all(isinstance(seconds[name], dict) for name in ("triton", "build"))
        assert all(float(seconds[name]) > 0 for name in ("import", "collect", "test", "graph"))
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(
            f"{path} cannot be read ({error!r}); `python -m layersync_kernels.bench.card --measure-compile` writes it"
        ) from None
    return dict(figures)


def makespan(jobs: Iterable[float], workers: int) -> float:
    """Seconds until the last of some jobs is done, the longest begun first."""
    busy = [0.0] * max(workers, 1)
    for job in sorted(jobs, reverse=True):
        heapq.heapreplace(busy, busy[0] + job)
    return max(busy)


def compile_seconds(work: Work, figures: Mapping[str, Any]) -> float:
    """CPU seconds that Triton and torch.compile take. One that nobody has measured takes as long as the longest."""
    known = figures["seconds"]["triton"]
    longest = max(known.values(), default=0.0)
    triton = sum(count * known.get(name, longest) for name, count in work.triton.items())
    return float(triton + work.graphs * figures["seconds"]["graph"])


def estimate(work: Work, figures: Mapping[str, Any], cores: int) -> float:
    """Seconds that a stage takes."""
    seconds = figures["seconds"]
    total = work.processes * (seconds["import"] + ASSUMED["open_card_s"]) + work.seconds
    total += (compile_seconds(work, figures) + work.tests * seconds["test"]) / work.workers
    if work.workers > 1:  # they start together, and each collects
        total += seconds["import"] + ASSUMED["open_card_s"]
    if work.collects:
        total += seconds["collect"]
    if work.build:
        total += sum(makespan(library.values(), cores) for library in seconds["build"].values())
    return float(total)


# ---- What timing a case takes the card


def _products(case: Case) -> float:
    """Floating-point operations of the matrix products in one forward pass."""
    rows, width = case.rows, case.width
    hidden = {"gelu_mlp": 8 * width, "projected_alignment": 768, "gram_alignment": 2 * rows}
    return 2.0 * rows * width * hidden.get(case.op, 0)


def timing_seconds(case: Case, rounds: int = 15, warmup: int = 3, providers: int = 5) -> float:
    """Of all modes and rounds, and of the check in fp64, if every provider moves what the eager formula does.

    Args:
        case: what is timed.
        rounds: of each mode.
        warmup: further rounds.
        providers: with the copy.
    """
    elements = sum(math.prod(shape) for shape in OPS[case.op].inputs(case.rows, case.width))
    if case.op == "gram_alignment":
        elements += 4 * case.rows**2
    moved = 8 * elements * case.dtype.itemsize / ASSUMED["bytes_per_s"]
    product = _products(case) / ASSUMED["flops_per_s"]
    if case.dtype.itemsize == 4:
        product *= 4
    both = moved + 3 * product
    calls = (warmup + rounds) * len(case.modes) * case.repeats * providers
    check = 2 * providers * both + 8 * moved + 3 * 20 * product  # fp64: more bytes, and a twentieth of the rate
    return calls * (2 * both + ASSUMED["launch_s"] / min(case.repeats, 10)) + check
