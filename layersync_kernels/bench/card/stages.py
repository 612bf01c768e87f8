"""What is worth running on a card, in that order, and how long each of it is expected to take."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...runtime.machine import find_tool
from ..cases import Case, cases
from ..throughput import ROUNDS, STEPS
from .budget import ASSUMED, Work, estimate, timing_seconds
from .build import ROOT, stamp
from .runner import Stage
from .state import ENVIRONMENT, RESULTS, TESTS, TUNING

_WORKERS = 12  # of pytest: each has a context on the card, and compiles on a core of its own
_PROVIDERS = ("eager", "compile", "triton", "cuda")
_MODULE = "layersync_kernels.bench.card"
WORK = ROOT / "build" / "gpu"
COMMON = {
    "TRITON_CACHE_DIR": str(WORK / "triton"),
    "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"),
    "TRITON_INTERPRET": "0",
    "COLUMNS": "160",
    "PYTHONUNBUFFERED": "1",
}
"""Variables of every stage."""
_HEADLINE, _LARGE = ("gated_residual_norm", "cosine_alignment"), (65536, 1152)
_OTHERS = ("modulated_layer_norm", "spatial_norm", "projected_alignment", "gram_alignment")


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
        extra: beyond the budget: it gets what is left of the time, and further calls.
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
    extra: bool = False

    def stage(self, figures: Mapping[str, Any], cores: int) -> Stage:
        """As it runs with a card, on a machine of so many cores."""
        return Stage(
            self.name,
            [*self.prefix, sys.executable, "-m", *self.module],
            estimate(self.work, figures, cores),
            environment={**COMMON, **self.environment},
            resumable=self.resumable,
            missing=self.missing,
            product=self.product,
        )


def _timing(suite: Sequence[Case], per_case: Mapping[str, Mapping[str, int]], *, compiled: bool = True) -> Work:
    kernels: dict[str, int] = {}
    for case in suite:
        for name, count in per_case.get(case_key(case), {}).items() if compiled else ():
            kernels[name] = kernels.get(name, 0) + count
    seconds = sum(timing_seconds(case, providers=5 if compiled else 3) for case in suite)
    return Work(triton=kernels, graphs=len(suite) if compiled else 0, seconds=seconds)


def case_key(case: Case) -> str:
    """Of the counts in benchmarks/card.json."""
    return f"{case.op} {case.width} {case.dtype_name}"


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
    timed += ["--providers", *_PROVIDERS]
    counts, per_case = figures["tests"], figures["cases"]

    def tests_plan(name: str, counted: str, *selection: str) -> Plan:
        its = counts[counted]
        work = Work(triton=its["triton"], tests=its["tests"], graphs=its["graphs"], collects=True, workers=workers)
        collected = [*pytest, "--collect-only", "-qq", *selection]
        return Plan(name, [*recorded, *selection], work, dry=collected, resumable=True)

    halves = {case for case in cases("cuda") if case.dtype == torch.bfloat16}
    headline = [case for case in cases("cuda", ops=_HEADLINE) if (case.rows, case.width) == _LARGE]
    headline = [case for case in headline if case.dtype != torch.float16]
    others = [case for case in cases("cuda", ops=_OTHERS) if case in halves]
    gelu = [case for case in cases("cuda", ops=("gelu_mlp",)) if case in halves]
    rest = [case for case in cases("cuda") if case not in headline and case not in others]
    exercise = [f"{_MODULE}.exercise", "cuda", "cuda"]
    sanitizer = find_tool("compute-sanitizer")
    sanitized = Work(processes=0, seconds=ASSUMED["sanitizer_s"])
    contenders, trainers = 5, 4  # of `bench trainer` on a card; two of them share a trainer
    steps = contenders * (2 + STEPS["cuda"] * ROUNDS["cuda"])
    trained = steps * ASSUMED["training_step_s"] + trainers * ASSUMED["build_model_s"]
    tuning = ["layersync_kernels.cli", "tune", "--quick", "--device", "cuda", "--out", str(out / TUNING)]
    large = ["--size", *map(str, _LARGE), "--dtypes", "bf16", "fp32"]
    return [
        Plan(
            "environment",
            [f"{_MODULE}.facts", "--out", str(out / ENVIRONMENT)],
            Work(),
            dry=[f"{_MODULE}.facts", "--out", str(out / ENVIRONMENT)],
        ),
        Plan("build", [f"{_MODULE}.build"], Work(build=True), product=stamp(ROOT)),
        tests_plan("GPU tests", "gpu", "-m", "gpu", "tests"),
        Plan(
            "headline benchmark",
            [*bench, "ops", "--ops", *_HEADLINE, *large, *timed],
            _timing(headline, per_case),
            dry=[
                *[*bench, "ops", "--ops", *_HEADLINE, "--quick", "--dtypes", "bf16", "--device", "cpu"],
                *["--providers", "eager", "compile", "cpp", "--json", results, "--resume"],
            ],
            resumable=True,
        ),
        Plan(
            "trainer benchmark",
            [*bench, "trainer", "--device", "cuda", "--json", results, "--resume"],
            Work(graphs=4, seconds=trained),
            dry=[*bench, "trainer", "--quick", "--device", "cpu", "--json", results, "--resume"],
            resumable=True,
        ),
        Plan("tuning", tuning, Work(processes=0, seconds=ASSUMED["tuning_s"])),
        tests_plan("op tests", "ops", "tests/ops", "-k", "triton or cuda"),
        *(
            Plan(
                tool,
                exercise,
                sanitized,
                dry=[f"{_MODULE}.exercise", "reference", "cpu"] if tool == "memcheck" else None,
                # Our kernels alone: the barriers in hardware by which cuBLAS's wait, racecheck does not know.
                prefix=[
                    *[sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"],
                    *["--kernel-name", "kns=layersync"],
                ],
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                missing=None if sanitizer else "compute-sanitizer is not installed",
            )
            for tool in ("memcheck", "racecheck")
        ),
        *(
            Plan(
                f"gelu_mlp, cuBLASLt epilogues {value}",
                [*bench, "ops", "--ops", "gelu_mlp", "--dtypes", "bf16", *timed[: -len(_PROVIDERS)], "eager", "cuda"],
                _timing(gelu, per_case, compiled=False),
                environment={"LAYERSYNC_CUBLASLT": value},
                resumable=True,
            )
            for value in ("0", "1")
        ),
        Plan(
            "benchmark of the other ops",
            [*bench, "ops", "--ops", *_OTHERS, "--dtypes", "bf16", *timed],
            _timing(others, per_case),
            resumable=True,
            extra=True,
        ),
        Plan("whole benchmark", [*bench, "ops", *timed], _timing(rest, per_case), resumable=True, extra=True),
    ]


def suite_cases() -> list[Case]:
    """One of each op, width and dtype that the stages time."""
    kept = {case_key(case): case for case in cases("cuda")}
    return list(kept.values())
