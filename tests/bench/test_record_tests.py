"""The pytest plugin by which the tests on a card go on where they were cut short."""

import json
import os
import signal
import sys

import pytest

from layersync_kernels.bench.card.record_tests import outcomes

PLUGIN = "layersync_kernels.bench.card.record_tests"
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
    """The exit code and the output of pytest in a process of its own; a fork, which has imported torch already."""
    output = folder / "output"
    options = ["-q", "-p", "no:cacheprovider", "-p", PLUGIN, "test_it.py", "--record", "tests.jsonl", *options]
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever a shell has made of it
            sys.stdout = sys.stderr = output.open("w")
            os.dup2(sys.stdout.fileno(), 1)
            os.chdir(folder)
            code = int(pytest.main(options))
            sys.stdout.flush()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output.read_text()


def test_each_test_is_written_down_and_runs_once(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    path = tmp_path / "tests.jsonl"
    code, said = run(tmp_path)
    assert code == pytest.ExitCode.INTERRUPTED
    assert "1 failed, 1 passed, 1 skipped" in said  # the summary
    found = {test.partition("::")[2]: outcome for test, outcome in outcomes(path).items()}
    assert found == {
        "test_passes": "passed", "test_fails": "failed", "test_skips": "skipped", "test_has_no_setup": "failed",
    }  # fmt: skip
    assert run(tmp_path)[0] == 9  # goes on at the test that was interrupted, and dies of the next
    code, said = run(tmp_path)
    assert code == pytest.ExitCode.TESTS_FAILED  # of earlier runs
    assert "1 passed, 6 deselected" in said
    assert "with earlier runs: 3 passed, 2 failed, 1 died, 1 skipped" in said
    (tmp_path / "mended").touch()
    (tmp_path / "test_it.py").write_text(TESTS.replace("(broken)", "()").replace("os._exit(9)", "pass"))
    code, said = run(tmp_path, "--record-retry")
    assert "3 passed, 4 deselected" in said
    assert code == pytest.ExitCode.OK
    code, said = run(tmp_path)
    assert "7 deselected" in said
    assert code == pytest.ExitCode.OK


LOST = """
from layersync_kernels.bench.card import record_tests
record_tests.device_lost = lambda device: True
def test_poisons(): raise RuntimeError("an illegal memory access was encountered")
def test_other(): pass
"""


def test_a_test_that_takes_the_device_with_it_ends_the_process_and_not_the_stage(tmp_path):
    (tmp_path / "test_it.py").write_text(LOST)
    code, said = run(tmp_path)
    assert code == 75
    assert "has left the device unusable" in said
    rows = [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()]
    assert [(row["test"], row["outcome"]) for row in rows] == [
        ("test_it.py::test_poisons", "started"), ("test_it.py::test_poisons", "failed"),
    ]  # fmt: skip
    code, said = run(tmp_path)
    assert "1 passed, 1 deselected" in said
    assert code == pytest.ExitCode.TESTS_FAILED


def test_a_worker_that_dies_takes_one_test_with_it(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text(LOST + "import os\ndef test_dies(): os._exit(9)\ndef test_last(): pass\n")
    code, _ = run(tmp_path, "-n", "1")
    found = {test.partition("::")[2]: outcome for test, outcome in outcomes(tmp_path / "tests.jsonl").items()}
    assert found == {"test_poisons": "failed", "test_other": "passed", "test_dies": "failed", "test_last": "passed"}
    assert code == pytest.ExitCode.TESTS_FAILED
