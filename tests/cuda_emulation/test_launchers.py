"""Runs the tests of the backend "cuda" on the CPU, in a process that the emulated library serves (see launchers.py)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

from . import launchers, selection

FILES = sorted(
    str(path.relative_to(launchers.ROOT))
    for folder in launchers.TESTS
    for path in (launchers.ROOT / folder).glob("test_*.py")
)

pytestmark = pytest.mark.skipif(launchers.COMPILER is None, reason="the emulator is compiled with g++, and there is none")


class Run(NamedTuple):
    """What became of every test of the backend, by file: test → outcome and text. And how the process ended."""

    tests: dict[str, dict[str, tuple[str, str]]]
    end: str


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    report = tmp_path_factory.mktemp("emulation") / "report"
    environment = launchers.environment(launchers.build()) | {selection.REPORT: str(report)}
    done = subprocess.run(
        [*launchers.PYTEST, *launchers.TESTS], env=environment, cwd=launchers.ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    tests: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    for line in map(json.loads, report.read_text().splitlines() if report.exists() else []):
        known = tests[line["test"].partition("::")[0]]
        if known.get(line["test"], ("",))[0] not in ("failed", "skipped"):  # a failure after the call counts
            known[line["test"]] = line["outcome"], line.get("text", "")
    return Run(tests, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")


def of_a_card(test):
    return test.startswith(tuple(selection.NOT_HERE))


@pytest.mark.parametrize("file", FILES)
def test_the_launchers_pass(run, file):
    """One that "started" ended the process, others that "exist" were not reached."""
    failed = {
        test: outcome for test, outcome in run.tests[file].items() if outcome[0] != "passed" and not of_a_card(test)
    }
    told = "\n\n".join(f"{test}: {outcome}\n{text}" for test, (outcome, text) in failed.items())
    ended = any(outcome in ("started", "exists") for outcome, _ in failed.values())
    assert not failed, f"{told}\n\n{run.end if ended else ''}"


def test_all_of_the_backend_has_run_but_what_needs_a_card(run):
    existing = {test for tests in run.tests.values() for test in tests}
    assert len(existing) > 900, run.end
    for prefix, reason in selection.NOT_HERE.items():
        assert any(test.startswith(prefix) for test in existing), f"no test {prefix} ({reason})"
    parametrized = {file for file in FILES if any("cuda" in test for test in run.tests[file])}
    assert parametrized >= {file for file in FILES if "FUSED" in (launchers.ROOT / file).read_text()}


def test_the_library_serves_only_a_process_that_asks(monkeypatch):
    """Nothing of the package knows of the emulation."""
    for path in (launchers.ROOT / "layersync_kernels").rglob("*.py"):
        assert launchers.LIBRARY not in path.read_text(), path


IMPORTED = {
    "cudaLaunchKernel", "cudaGetLastError", "cudaGetErrorString",  # what launch.h calls
    # What nvcc adds: registration of the kernels, and what stands behind their names.
    "__cudaRegisterFatBinary", "__cudaRegisterFatBinaryEnd", "__cudaUnregisterFatBinary", "__cudaRegisterFunction",
    "__cudaInitModule", "__cudaPushCallConfiguration", "__cudaPopCallConfiguration", "__cudaGetKernel",
    "__cudaLaunchKernel", "__cudaRegisterVar",
}  # fmt: skip


@pytest.mark.parametrize("library", sorted((launchers.ROOT / "layersync_kernels").glob("_cuda*.so")), ids=lambda p: p.name)
def test_the_built_library_calls_the_runtime_for_launches_alone(library):
    """What it does not import it cannot call: nothing that waits for the card, or takes memory from it."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm of binutils")
    listed = subprocess.run([nm, "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    calls = {name for name in names if name.lstrip("_").startswith(("cuda", "cu", "cublas"))}
    assert "cudaLaunchKernel" in calls
    assert calls <= IMPORTED, calls - IMPORTED
