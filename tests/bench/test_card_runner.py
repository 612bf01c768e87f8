"""The runner of benchmarks/gpu.sh, with stages that are a line of Python each."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from layersync_kernels.bench.card import state
from layersync_kernels.bench.card.runner import FAILED, PASSED, UNFINISHED, Runner, Stage
from layersync_kernels.bench.engine import DEVICE_LOST
from layersync_kernels.errors import UserError

CARD = {"gpu": "a card", "source": "abc"}


def stage(name, code, **options):
    return Stage(name, [sys.executable, "-c", code], **{"estimate": 1.0, **options})


def noted(path, then=""):
    """A stage's code that leaves a line in a file each time it runs."""
    return f"open({str(path)!r}, 'a').write('ran\\n')\n{then}"


def runs(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def statuses(out):
    return {name: record["status"] for name, record in json.loads((out / "state.json").read_text())["stages"].items()}


def run(out, *stages, identity=CARD, clock=time.monotonic, seconds=100.0, grace=5.0, **options):
    return Runner(out, seconds, grace, clock).run(stages, identity, **options)


def clock_until(path):
    """Stands still until the file is there; then all time is over."""
    return lambda: 1e6 if path.exists() else 0.0


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_a_second_call_passes_over_what_is_over_and_retries_on_demand(out, tmp_path, capfd):
    files = {name: tmp_path / name for name in "abc"}
    codes = {"a": "", "b": "raise SystemExit(4)", "c": ""}
    stages = [stage(name, noted(files[name], codes[name])) for name in "abc"]
    assert run(out, *stages) == FAILED
    assert statuses(out) == {"a": "passed", "b": "failed", "c": "passed"}  # a failure goes on
    assert run(out, *stages) == FAILED
    assert [runs(path) for path in files.values()] == [1, 1, 1]
    stages[1] = stage("b", noted(files["b"]))
    assert run(out, *stages, retry=True) == PASSED
    assert [runs(path) for path in files.values()] == [1, 2, 1]
    assert run(out, *stages, fresh=True) == PASSED
    assert [runs(path) for path in files.values()] == [2, 3, 2]
    assert "begun anew: what was there is in aside-1.zip" in capfd.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["aside-1.zip", "log.txt", "state.json"]


POLITE = """
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(600)
except KeyboardInterrupt:
    print("a", "summary")  # the log has this line as well
"""


def test_the_end_of_the_time_is_told_by_sigint_and_the_next_call_goes_on(out, tmp_path):
    ready = tmp_path / "ready"
    cut = Stage("cut", [sys.executable, "-c", POLITE, str(ready)], estimate=1.0, resumable=True)
    later = stage("later", "")
    assert run(out, cut, later, clock=clock_until(ready)) == UNFINISHED
    assert statuses(out) == {"cut": "cut"}
    log = (out / "log.txt").read_text()
    assert "a summary" in log
    assert "later: not begun" in log
    ready.unlink()
    assert run(out, stage("cut", "", resumable=True), later) == PASSED
    assert json.loads((out / "state.json").read_text())["stages"]["cut"]["runs"] == 2


STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # ignores them as well
path = pathlib.Path(sys.argv[1])
path.with_suffix(".new").write_text(str(child.pid))
path.with_suffix(".new").rename(path)
time.sleep(600)
"""


def test_a_stage_that_ignores_signals_is_killed_with_what_it_has_started(out, tmp_path):
    ready = tmp_path / "ready"
    stubborn = Stage("stubborn", [sys.executable, "-c", STUBBORN, str(ready)], estimate=1.0)
    assert run(out, stubborn, clock=clock_until(ready), grace=0.1) == UNFINISHED
    assert statuses(out) == {"stubborn": "cut"}
    status = Path(f"/proc/{ready.read_text()}/status")
    deadline = time.monotonic() + 60
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not status.exists() or "zombie" in status.read_text()


def test_time_that_is_left_goes_to_what_was_cut_by_its_own_limit(out, tmp_path):
    ready = tmp_path / "ready"
    again = f"if os.path.exists({str(ready)!r}): raise SystemExit"
    code = f"import os, time\n{again}\nopen({str(ready)!r}, 'w')\ntime.sleep(600)"

    def clock():
        return 100.0 if ready.exists() else 0.0

    # The limit of 17 is over by then, all of the time is not.
    assert run(out, stage("slow", code, resumable=True), stage("next", ""), clock=clock, seconds=500) == PASSED
    assert json.loads((out / "state.json").read_text())["stages"]["slow"]["runs"] == 2


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGSEGV)", f"sys.exit({DEVICE_LOST})"])
def test_a_stage_that_dies_goes_on_in_a_new_process_if_it_can(end, out, tmp_path):
    marks = tmp_path / "marks"
    code = f"import os, signal, sys\n{noted(marks)}\nif len(open({str(marks)!r}).readlines()) < 3: {end}"
    assert run(out, stage("resumable", code, resumable=True)) == PASSED
    assert runs(marks) == 3
    marks.unlink()
    assert run(out, stage("not", code)) == FAILED
    assert runs(marks) == 1


def test_what_is_missing_is_told_and_is_no_failure(out, capfd):
    assert run(out, stage("tool", "raise SystemExit(1)", missing="no such tool"), stage("other", "")) == PASSED
    assert statuses(out) == {"tool": "missing", "other": "passed"}
    assert "tool: missing: no such tool" in capfd.readouterr().out
    assert run(out, stage("tool", ""), stage("other", "")) == PASSED  # it is there now
    assert statuses(out)["tool"] == "passed"
    assert run(out, Stage("absent", [str(out / "no-such-program")], 1.0)) == FAILED
    assert "cannot be started" in capfd.readouterr().out


def test_a_product_that_did_not_come_along_is_made_again(out, tmp_path):
    product, marks = tmp_path / "product", tmp_path / "marks"
    build = stage("build", noted(marks, f"open({str(product)!r}, 'w')"), product=product)
    assert run(out, build) == run(out, build) == PASSED
    assert runs(marks) == 1
    product.unlink()
    assert run(out, build) == PASSED
    assert runs(marks) == 2


@pytest.mark.parametrize("name", ["gpu", "source"], ids=["card", "source"])
def test_results_of_another_card_or_source_are_put_aside_and_never_mixed(name, out, capfd):
    assert run(out, stage("a", "")) == PASSED
    (out / "results.jsonl").write_text("old rows\n")
    (out / "notes.md").write_text("somebody's own\n")
    assert run(out, stage("b", ""), identity={**CARD, name: "another"}) == PASSED
    assert statuses(out) == {"b": "passed"}
    assert f"the results are of {name} {CARD[name]}, here another" in capfd.readouterr().out
    with zipfile.ZipFile(out / "aside-1.zip") as archive:
        assert sorted(archive.namelist()) == ["log.txt", "results.jsonl", "state.json"]
        assert archive.read("results.jsonl") == b"old rows\n"
    assert not (out / "results.jsonl").exists()
    assert (out / "notes.md").exists()


DAMAGED = {
    "empty": b"",
    "cut": b'{"version": 1, "iden',
    "no object": b"[]",
    "no text": b"\xff\xfe",
    "deep": b"[" * 100_000,
    "version": b'{"version": 2, "identity": {}, "stages": {}}',
    "identity": b'{"version": 1, "identity": {"gpu": 3}, "stages": {}}',
    "no stages": b'{"version": 1, "identity": {"gpu": "a card", "source": "abc"}, "stages": []}',
    "status": b'{"version": 1, "identity": {"gpu": "a card", "source": "abc"}, "stages": {"a": {"status": "fine"}}}',
    "status type": b'{"version": 1, "identity": {"gpu": "a card", "source": "abc"}, "stages": {"a": {"status": []}}}',
    "field": b'{"version": 1, "identity": {"gpu": "a card", "source": "abc"}, "stages": {"a": {"state": "passed"}}}',
    "seconds": b'{"version": 1, "identity": {}, "stages": {"a": {"status": "passed", "seconds": "long"}}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_state_is_told_and_put_aside(content, out, capfd):
    out.mkdir()
    (out / "state.json").write_bytes(content)
    assert run(out, stage("a", "")) == PASSED
    assert statuses(out) == {"a": "passed"}
    assert "state.json cannot be read (" in capfd.readouterr().out
    with zipfile.ZipFile(out / "aside-1.zip") as archive:
        assert archive.read("state.json") == content


def test_results_without_a_state_are_put_aside(out, capfd):
    out.mkdir()
    (out / "results.jsonl").write_text("whose?\n")
    assert run(out, stage("a", "")) == PASSED
    assert "results without a state: what was there is in aside-1.zip" in capfd.readouterr().out
    assert not (out / "results.jsonl").exists()


def test_two_calls_in_one_folder(out, tmp_path):
    out.mkdir()
    with state.only_writer(out), pytest.raises(UserError, match="another run writes to"):
        run(out, stage("a", ""))
    assert list(out.iterdir()) == []
    assert run(out, stage("a", "")) == PASSED  # the lock went with its holder


CALL = """
import sys
from pathlib import Path
from tests.bench.test_card_runner import CARD, POLITE, Stage, Runner
ready, out = Path(sys.argv[1]), Path(sys.argv[2])
stages = [Stage(name, [sys.executable, "-c", POLITE, str(ready)], 1.0, resumable=True) for name in ("first", "second")]
sys.exit(Runner(out, 600).run(stages, CARD))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_call_that_is_ended_leaves_a_state_to_go_on_with(number, out, tmp_path):
    """Begun with SIGINT ignored, as a shell begins what runs in the background; stages get it all the same."""
    ready = tmp_path / "ready"
    call = subprocess.Popen(
        [sys.executable, "-c", CALL, ready, out],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        start_new_session=True,
    )
    while not ready.exists():
        assert call.poll() is None
        time.sleep(0.01)
    os.kill(call.pid, number)
    if number == signal.SIGKILL:
        call.wait()
        (child,) = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and str(ready) in _command_of(p)]
        os.kill(child, signal.SIGKILL)
    else:
        assert call.wait(timeout=300) == 128 + number  # for ever, if the signal does not come through
        assert "a summary" in (out / "log.txt").read_text()
    assert statuses(out) == {"first": "cut"}
    assert run(out, stage("first", ""), stage("second", "")) == PASSED


def _command_of(process):
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
