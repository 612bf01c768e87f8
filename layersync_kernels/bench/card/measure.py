"""`--measure-compile`: counts and times what the stages compile, on a machine without a card, for benchmarks/card.json.

Times are CPU seconds, of the compilers that are started too: other work on the machine does not count.
`python -m ... .measure cases` prints what the timed cases compile, alone: Triton has to be imported before it is told
to interpret.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..cases import OPS, Case, provider
from ..engine import Truth, check, truth_of
from ..machine import machine_facts
from .budget import FIGURES
from .build import ROOT, copy_sources, quick_compiler
from .stages import case_key, suite_cases

_COMMAND = "python -m layersync_kernels.bench.card --measure-compile"
# Not the tests that are about memory beyond 32-bit offsets: they take gigabytes, and compile nothing of their own.
_ON_A_CARD = "triton and not cuda and not 32_bit"
_COMPILER = """#!{python}
import json, os, resource, subprocess, sys
code = subprocess.call([{tool!r}, *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
if "-o" in sys.argv:
    with open({log!r}, "a") as log:
        log.write(json.dumps([sys.argv[sys.argv.index("-o") + 1], used.ru_utime + used.ru_stime]) + "\\n")
sys.exit(code)
"""


def cpu_seconds() -> float:
    """Of this process and of those it has waited for."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _timed(work: Callable[[], object]) -> float:
    began = cpu_seconds()
    work()
    return cpu_seconds() - began


def _command(*arguments: str, **environment: str) -> str:
    """The output of the interpreter; one thread, and Triton as on a card."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.stdout


def case_counts(compiling: bool) -> dict[str, Any]:
    """What Triton compiles for each op, width and dtype; and the seconds of each kernel, where it compiles."""
    from . import launches

    recorded = launches.record(compiling)
    counts: dict[str, dict[str, int]] = {}
    for case in suite_cases():
        recorded.found.clear()
        small = dataclasses.replace(case, rows=min(case.rows, 64), device="cpu")
        inputs = small.inputs(0)
        # The truth is of no use here: what the launches should have computed is not there.
        empty = Truth(inputs, [], [], small.rows)
        with contextlib.suppress(ValueError):  # outputs and truth are not as many
            check(small, functools.partial(OPS[case.op].fused, backend="triton"), empty)
        counts[case_key(case)] = recorded.counts()
    medians = {name: round(statistics.median(values), 2) for name, values in sorted(recorded.seconds.items())}
    return {"cases": counts, "seconds": {"triton": medians}}


def _graph_seconds() -> float:
    """The compiler's time for a formula with its gradient, in C++, since there is no card."""
    seconds = []
    for op in ("gated_residual_norm", "cosine_alignment"):
        case = Case(op, 512, 384, torch.bfloat16, "cpu")
        truth, compiled = truth_of(case), provider("compile", case)
        seconds.append(_timed(lambda case=case, truth=truth, compiled=compiled: check(case, compiled, truth)))  # type: ignore[misc]
    return round(statistics.mean(seconds), 1)


def _build_seconds(work: Path) -> dict[str, dict[str, float]]:
    """Library to the seconds of each of its files, for one architecture."""
    from torch.utils.cpp_extension import CUDA_HOME

    log = work / "compiled.jsonl"
    for name, tool in (
        ("c++", str(quick_compiler(work / "quick-c++"))),
        ("nvcc", f"{os.environ.get('CUDA_HOME') or CUDA_HOME}/bin/nvcc"),
    ):
        script = work / name
        script.write_text(_COMPILER.format(python=sys.executable, tool=str(tool), log=str(log)))
        script.chmod(0o755)
    tree = work / "tree"
    copy_sources(tree)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(work / "lib")],
        cwd=tree,
        env={
            **os.environ, "LAYERSYNC_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0", "CXX": str(work / "c++"),
            "PYTORCH_NVCC": str(work / "nvcc"), "MAX_JOBS": "1",
        },
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"the build ended with status {done.returncode}")
    libraries: dict[str, dict[str, float]] = {"_C": {}, "_cuda": {}}
    for line in log.read_text().splitlines():
        output, seconds = json.loads(line)
        if output.endswith(".o"):
            place = Path(output)
            library = "_cuda" if place.stem.startswith("cuda") else "_C"
            libraries[library][f"{place.parent.name}/{place.stem}"] = round(seconds, 1)
    return libraries


def _test_counts(work: Path) -> dict[str, Any]:
    """Stage to the tests that it runs on a card and what they compile, by the pretended card of tests/bench."""
    counts: dict[str, Any] = {stage: {"tests": 0, "graphs": 0, "triton": {}} for stage in ("gpu", "ops")}
    for path in sorted((ROOT / "tests" / "ops").glob("test_*.py")):
        out = work / f"{path.stem}.json"
        pytest = ["-O", "-m", "pytest", "--assert=plain", "-p", "tests.bench.pretended_card", "-p", "no:cacheprovider"]
        _command(*pytest, "-q", str(path), "-k", _ON_A_CARD, PRETENDED_CARD_OUT=str(out))
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"triton": {}}
        entry = counts["gpu" if path.stem.endswith("_gpu") else "ops"]
        for name, count in found["triton"].items():
            entry["triton"][name] = entry["triton"].get(name, 0) + count
    counts["gpu"]["tests"] = collected("-m", "gpu", "tests")
    counts["ops"]["tests"] = collected("tests/ops", "-k", "triton or cuda")
    for stage, selection in (("gpu", ("-m", "gpu", "tests")), ("ops", ("tests/ops",))):  # a graph each, or less
        kept = "compil" if stage == "gpu" else "compil and triton and not cuda"
        counts[stage]["graphs"] = collected(*selection, "-k", kept)
    return counts


def collected(*selection: str) -> int:
    """How many tests pytest finds."""
    output = _command("-m", "pytest", "-o", "addopts=", "--collect-only", "-q", "-p", "no:cacheprovider", *selection)
    return sum("::" in line for line in output.splitlines())


def _processes(work: Path) -> dict[str, Any]:
    start = _timed(lambda: _command("-c", "import torch, layersync_kernels"))
    collect = _timed(lambda: collected("-m", "gpu", "tests"))
    only = ["-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "tests/ops/test_gelu.py", "-k", "cpp"]
    tests = _timed(lambda: _command(*only)) - _timed(lambda: _command(*only, "--collect-only"))
    number = collected("tests/ops/test_gelu.py", "-k", "cpp")
    return {
        "seconds": {
            "import": round(start, 1),
            "collect": round(collect - start, 1),
            "test": round(tests / max(number, 1), 3),
        }
    }


def _kernels(work: Path) -> dict[str, Any]:
    return dict(json.loads(_command("-m", f"{__package__}.measure", "compile").splitlines()[-1]))


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "seconds": _processes,
    "graph": lambda work: {"seconds": {"graph": _graph_seconds()}},
    "kernels": _kernels,
    "tests": lambda work: {"tests": _test_counts(work)},
    "build": lambda work: {"seconds": {"build": _build_seconds(work)}},
}
"""Name to what measures it: a part of the file."""


def write(parts: Sequence[str] = tuple(PARTS)) -> None:
    """Measure some parts or all, some twenty minutes of a core, and write each into benchmarks/card.json."""
    for name in parts:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            caches = {"TRITON_CACHE_DIR": str(work / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
            os.environ.update(caches)
            measured = PARTS[name](work)
            figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
            seconds = {**figures.get("seconds", {}), **measured.pop("seconds", {})}
            head = {"command": _COMMAND, "machine": machine_facts("cpu")}
            FIGURES.write_text(json.dumps({**figures, **head, **measured, "seconds": seconds}, indent=1) + "\n")
            print(f"{name}: written to {FIGURES}", flush=True)


def main(argv: Sequence[str]) -> int:
    """Names of `PARTS`; `cases` or `compile`."""
    if argv[0] in PARTS:
        write(argv)
    else:
        print(json.dumps(case_counts(compiling=argv[0] == "compile")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
