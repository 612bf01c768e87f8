"""Runs the tests of the backend "cuda" on the CPU, in a process that the emulated library serves (see launchers.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import defaultdict
from typing import NamedTuple

import pytest

from . import launchers, selection
from .selection import NOT_HERE

pytestmark = pytest.mark.skipif(launchers.COMPILER is None, reason="the emulator is compiled with g++")
BUILT = sorted((launchers.ROOT / "layersync_kernels").glob("_cuda*.so"))


FILES = sorted(
    str(path.relative_to(launchers.ROOT))
    for folder in launchers.TESTS
    for path in (launchers.ROOT / folder).glob("test_*.py")
    if any(word in path.read_text() for word in ("support.backends", '"cuda"', "harness"))
    or str(path).endswith(selection.BY_AUTO)
)


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
    assert tests, done.stdout + done.stderr
    return Run(tests, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")


@pytest.mark.parametrize("file", FILES)
def test_the_launchers_pass(run, file):
    """A test that "started" ended the process; those that "exist" were not reached."""
    wanted = {test: outcome for test, outcome in run.tests[file].items() if not test.startswith(tuple(NOT_HERE))}
    failed = {test: outcome for test, outcome in wanted.items() if outcome[0] != "passed"}
    told = "\n\n".join(f"{test}: {outcome}\n{text}" for test, (outcome, text) in failed.items())
    ended = any(outcome in ("started", "exists") for outcome, _ in failed.values())
    assert not failed, f"{told}\n\n{run.end if ended else ''}"


def test_all_tests_of_the_backend_have_run_but_those_listed(run):
    outcomes = {test: outcome for tests in run.tests.values() for test, (outcome, _) in tests.items()}
    ran = [test for test, outcome in outcomes.items() if outcome == "passed"]
    left = {test for test in outcomes if test.startswith(tuple(NOT_HERE))}
    assert len(ran) == len(outcomes) - len(left), run.end
    assert len(ran) > 900, run.end  # or the selection finds no longer what it is there for
    assert {test.partition("::")[0] for test in ran} <= set(FILES)  # whose failures are shown
    for prefix, reason in NOT_HERE.items():
        assert any(test.startswith(prefix) for test in left), f"no test {prefix} ({reason})"


def test_the_package_knows_nothing_of_the_emulation():
    for path in (launchers.ROOT / "layersync_kernels").rglob("*.py"):
        assert launchers.LIBRARY not in path.read_text(), path


IMPORTED = {
    "cudaLaunchKernel", "cudaGetLastError", "cudaGetErrorString",  # what launch.h calls
    # What nvcc adds: registration of the kernels, and what stands behind their names.
    "__cudaRegisterFatBinary", "__cudaRegisterFatBinaryEnd", "__cudaUnregisterFatBinary", "__cudaRegisterFunction",
    "__cudaInitModule", "__cudaPushCallConfiguration", "__cudaPopCallConfiguration", "__cudaGetKernel",
    "__cudaLaunchKernel", "__cudaRegisterVar",
}  # fmt: skip


@pytest.mark.parametrize("library", BUILT, ids=lambda path: path.name)
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
