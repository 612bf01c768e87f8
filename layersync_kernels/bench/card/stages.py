"""What is worth running on a card, in that order, and how long each of it is expected to take."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cases import Case, cases
from .budget import ASSUMED, Work, estimate, timing_seconds
from .build import ROOT, stamp
from .facts import find_tool
from .runner import Stage
from .state import ENVIRONMENT, RESULTS, TESTS, TUNING

_WORKERS = 8  # of pytest: each has a context on the card, and Triton compiles on its own core
_MODULE = "layersync_kernels.bench.card"
_HEADLINE = ("gated_residual_norm", "cosine_alignment")


@dataclass(frozen=True)
class Plan:
    """A stage before it is known where it runs.

    Attributes:
        name: of the stage.
        module: with its arguments, for `python -m`.
        work: what it does on a card.
        dry: arguments that a machine without a card runs in its place; None for what it cannot.
        prefix: what runs the interpreter.
        environment, resumable, missing, product: of the `Stage`.
    """

    name: str
    module: Sequence[str]
    work: Work
    dry: Sequence[str] | None = None
    prefix: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    resumable: bool = False
    missing: str | None = None
    product: Path | None = None

    def stage(self, figures: Mapping[str, Any], cores: int) -> Stage:
        """As it runs with a card, on a machine of so many cores."""
        return Stage(
            self.name,
            [*self.prefix, sys.executable, "-m", *self.module],
            estimate(self.work, figures, cores),
            environment=self.environment,
            resumable=self.resumable,
            missing=self.missing,
            product=self.product,
        )


def _suite_work(suite: Sequence[Case], triton: Mapping[str, Mapping[str, int]]) -> Work:
    kernels: dict[str, int] = {}
    for case in suite:
        for name, count in triton.get(case_key(case), {}).items():
            kernels[name] = kernels.get(name, 0) + count
    graphs = sum(2 if case.op == "cosine_alignment" else 1 for case in suite)  # "compile", and "inductor" of the loss
    return Work(triton=kernels, graphs=graphs, seconds=sum(map(timing_seconds, suite)))


def case_key(case: Case) -> str:
    """Of the counts in benchmarks/card.json."""
    return f"{case.op} {case.width} {str(case.dtype).removeprefix('torch.')}"


def plans(out: Path, figures: Mapping[str, Any], *, retry: bool = False) -> list[Plan]:
    """All stages in order of worth.

    Args:
        out: folder of results.
        figures: of `load_figures`.
        retry: let pytest repeat what has failed.
    """
    results, tests = str(out / RESULTS), str(out / TESTS)
    workers = _WORKERS if importlib.util.find_spec("xdist") else 1
    pytest = ["pytest", "-o", "addopts=-ra", "-q", "-p", "no:cacheprovider", "-p", f"{_MODULE}.record_tests"]
    recorded = [*pytest, "--continue-on-collection-errors", "--record", tests, *["--record-retry"] * retry]
    if workers > 1:
        recorded += ["-n", str(workers), "--dist", "worksteal"]
    bench = ["layersync_kernels.cli", "bench"]
    timed = ["--device", "cuda", "--json", results, "--resume"]
    counts, per_case = figures["tests"], figures["cases"]

    def tested(name: str) -> Work:
        its = counts[name]
        return Work(triton=its["triton"], tests=its["tests"], graphs=its["graphs"], collects=True, workers=workers)

    def op_work(suite: Sequence[Case]) -> Work:
        return _suite_work(suite, per_case)

    headline = [case for case in cases("cuda", ops=_HEADLINE) if (case.rows, case.width) == (65536, 1152)]
    gelu = cases("cuda", ops=("gelu_mlp",))
    rest = [case for case in cases("cuda") if case not in headline and case not in gelu]
    exercise = [f"{_MODULE}.exercise", "cuda", "cuda"]
    sanitizer = find_tool("compute-sanitizer")
    sanitized = Work(seconds=ASSUMED["sanitizer_s"])
    steps, contenders = 2 * 5 + 4 * 5 * 10, 4  # warm-up, and 4 steps of five contenders in ten rounds; their trainers
    trained = steps * ASSUMED["training_step_s"] + contenders * ASSUMED["build_model_s"]
    tuning = ["layersync_kernels.cli", "tune", "--quick", "--device", "cuda", "--out", str(out / TUNING)]
    no_tuning = None if importlib.util.find_spec("layersync_kernels.bench.tune") else "no command `layersync tune` here"
    return [
        Plan(
            "environment",
            [f"{_MODULE}.facts", "--out", str(out / ENVIRONMENT)],
            Work(),
            dry=[f"{_MODULE}.facts", "--out", str(out / ENVIRONMENT)],
        ),
        Plan("build", [f"{_MODULE}.build"], Work(build=True), product=stamp(ROOT)),
        Plan(
            "GPU tests",
            [*recorded, "-m", "gpu", "tests"],
            tested("gpu"),
            dry=[*pytest, "--collect-only", "-qq", "-m", "gpu", "tests"],
            resumable=True,
        ),
        Plan(
            "headline benchmark",
            [*bench, "ops", "--ops", *_HEADLINE, "--size", "65536", "1152", *timed],
            op_work(headline),
            dry=[*bench, "ops", "--ops", *_HEADLINE, "--quick", "--device", "cpu", "--json", results, "--resume"],
            resumable=True,
        ),
        Plan(
            "trainer benchmark",
            [*bench, "trainer", *timed],
            Work(triton={}, graphs=4, seconds=trained),
            dry=[*bench, "trainer", "--quick", "--device", "cpu", "--json", results, "--resume"],
            resumable=True,
        ),
        Plan("tuning", tuning, op_work(rest), missing=no_tuning),
        Plan(
            "op tests",
            [*recorded, "tests/ops", "-k", "triton or cuda"],
            tested("ops"),
            dry=[*pytest, "--collect-only", "-qq", "tests/ops", "-k", "triton or cuda"],
            resumable=True,
        ),
        *(
            Plan(
                tool,
                exercise,
                sanitized,
                dry=[f"{_MODULE}.exercise", "reference", "cpu"] if tool == "memcheck" else None,
                prefix=[sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"],
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                missing=None if sanitizer else "compute-sanitizer is not installed",
            )
            for tool in ("memcheck", "racecheck")
        ),
        *(
            Plan(
                f"gelu_mlp, cuBLASLt epilogues {value}",
                [*bench, "ops", "--ops", "gelu_mlp", *timed],
                op_work(gelu),
                environment={"LAYERSYNC_CUBLASLT": value},
                resumable=True,
            )
            for value in ("0", "1")
        ),
        Plan("benchmark suite", [*bench, "ops", *timed], op_work(rest), resumable=True),
    ]


def suite_cases() -> list[Case]:
    """One of each op, width and dtype that the stages time."""
    kept = {case_key(case): case for case in cases("cuda")}
    return list(kept.values())


def cores() -> int:
    """Of this machine."""
    return os.cpu_count() or 1
