"""The pytest plugin by which the tests on a card go on where they were cut short."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from layersync_kernels.bench.card.record_tests import outcomes

TESTS = """
import os, pathlib, signal
import pytest

def test_passes(): pass
def test_fails(): assert pathlib.Path("mended").exists()
@pytest.mark.skip
def test_skips(): pass
@pytest.fixture
def broken(): raise RuntimeError("setup")
def test_has_no_setup(broken): pass
def test_is_interrupted():
    if not pathlib.Path("again").exists():
        pathlib.Path("again").touch()
        os.kill(os.getpid(), signal.SIGINT)
def test_kills_its_process(): os._exit(9)
def test_last(): pass
"""


def run(folder, *options):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "layersync_kernels.bench.card.record_tests",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [*command, "test_it.py", "--record", "tests.jsonl", *options],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_each_test_is_written_down_and_runs_once(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    path = tmp_path / "tests.jsonl"
    interrupted = run(tmp_path)
    assert interrupted.returncode == pytest.ExitCode.INTERRUPTED
    assert "1 passed, 1 failed" in interrupted.stdout or "1 failed, 1 passed" in interrupted.stdout  # the summary
    found = {test.partition("::")[2]: outcome for test, outcome in outcomes(path).items()}
    assert found == {
        "test_passes": "passed", "test_fails": "failed", "test_skips": "skipped", "test_has_no_setup": "failed",
    }  # fmt: skip
    assert run(tmp_path).returncode == 9  # goes on at the test that was interrupted, and dies of the next
    last = run(tmp_path)
    assert last.returncode == pytest.ExitCode.TESTS_FAILED  # of earlier runs
    assert "1 passed, 6 deselected" in last.stdout
    assert "with earlier runs: 3 passed, 2 failed, 1 died, 1 skipped" in last.stdout
    (tmp_path / "mended").touch()
    (tmp_path / "test_it.py").write_text(TESTS.replace("(broken)", "()").replace("os._exit(9)", "pass"))
    again = run(tmp_path, "--record-retry")
    assert "3 passed, 4 deselected" in again.stdout
    assert again.returncode == pytest.ExitCode.OK
    nothing_left = run(tmp_path)
    assert "7 deselected" in nothing_left.stdout
    assert nothing_left.returncode == pytest.ExitCode.OK


LOST = """
from layersync_kernels.bench.card import record_tests
record_tests.device_lost = lambda device: True
def test_poisons(): raise RuntimeError("an illegal memory access was encountered")
def test_other(): pass
"""


def test_a_test_that_takes_the_device_with_it_ends_the_process_and_not_the_stage(tmp_path):
    (tmp_path / "test_it.py").write_text(LOST)
    first = run(tmp_path)
    assert first.returncode == 75
    assert "has left the device unusable" in first.stdout
    rows = [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()]
    assert [(row["test"], row["outcome"]) for row in rows] == [
        ("test_it.py::test_poisons", "started"), ("test_it.py::test_poisons", "failed"),
    ]  # fmt: skip
    second = run(tmp_path)
    assert "1 passed, 1 deselected" in second.stdout
    assert second.returncode == pytest.ExitCode.TESTS_FAILED
