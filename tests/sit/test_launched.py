"""Runs that torchrun starts: what they leave, how they go on, how they end."""

import datetime
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from layersync_kernels import cli
from layersync_kernels.sit.checkpoints.local import list_checkpoints, read_tensors, tensors_path
from layersync_kernels.sit.distributed.processes import agree_on_attempt
from layersync_kernels.sit.distributed.watchdog import Watchdog
from layersync_kernels.sit.training.folder import LOCK
from layersync_kernels.sit.training.runlog import read_records

SECONDS = 150
pytestmark = pytest.mark.xdist_group("launched")
FLAGS = [
    *("--model=SiT-P/2", "--hidden-size=16", "--num-heads=2", "--depth=3", "--batch-size=8", "--lr=1e-3", "--flip"),
    *("--sampling-steps=2", "--grid-columns=2", "--no-tensorboard", "--device=cpu", "--precision=fp32", "--keep=9"),
    *("--log-every=2", "--sample-every=0", "--checkpoint-every=4", "--timeout=60", "--cfg-scale=1", "--clip-norm=1"),
    *("--lr-schedule=constant", "--warmup-steps=0", "--max-seconds=None"),  # no rate that follows the clock
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (60, 4, 4), np.uint8)
    np.savez(path, images=images, labels=np.arange(60) % 3)
    return path


def launch(processes, *arguments, restarts=0, **variables):
    """torchrun with that many processes of one thread, and these variables of the environment."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, f"--max-restarts={restarts}", "-m", "layersync_kernels", "train", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | variables
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process, seconds=SECONDS):
    """Exit code and output of a launch; one that hangs is killed."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"torchrun did not end in {seconds} s:\n{output}")
    return process.returncode, output


def train(*arguments):
    return cli.main(["train", *map(str, arguments)])


def weights(run):
    return read_tensors(tensors_path(list_checkpoints(run)[-1], "ema"))


def losses(run):
    return {record["step"]: record["loss"] for record in read_records(run)}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Eight steps of a single process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(f"--data={data}", f"--out={run}", "--steps=8", *FLAGS) == 0
    return run


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(data, alone, tmp_path, parallel):
    run = tmp_path / "run"
    code, output = ended(launch(2, f"--data={data}", f"--out={run}", "--steps=4", f"--parallel={parallel}", *FLAGS))
    assert code == 0, output
    assert output.count("done: step 4") == 1  # one of them speaks
    assert f"cpu x 2 processes ({parallel})" in output
    assert not (run / LOCK).exists()
    assert not (run / "stacks").exists()
    assert train(f"--out={run}", "--resume", "--steps=6") == 0
    code, output = ended(launch(2, f"--out={run}", "--resume", "--steps=8"))
    assert code == 0, output
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=0, atol=3e-3)  # AdamW's first steps are signs


@pytest.mark.slow  # as cases of test_bad_input.py, without torchrun
def test_an_error_of_all_is_said_once(data, tmp_path):
    code, output = ended(launch(2, f"--data={data}", f"--out={tmp_path / 'run'}", *FLAGS, "--batch-size=5"))
    assert code != 0
    message = "--batch-size 5, which is that of all processes, does not divide into 2 processes; give a multiple of 2"
    assert output.count(message) == 1
    assert not (tmp_path / "run").exists()


def _started(run, process, steps):
    """Waits until a run has come to a record of that many steps, and to a checkpoint."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        if list_checkpoints(run) and any(step >= steps for step in losses(run)):
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(process.communicate()[0])


def children(process):
    found = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True)
    return sorted(map(int, found.stdout.split()))


def test_the_end_of_one_ends_the_others(data, tmp_path):
    run = tmp_path / "run"
    process = launch(2, f"--data={data}", f"--out={run}", "--steps=1000000", *FLAGS)
    _started(run, process, 4)
    os.kill(children(process)[-1], signal.SIGKILL)
    code, output = ended(process)
    assert code != 0
    assert "Signal 9 (SIGKILL)" in output
    assert train(f"--out={run}", "--resume", f"--steps={max(losses(run)) + 4}") == 0  # the lock went with the process


def test_started_again_a_run_goes_on(data, alone, tmp_path):
    run = tmp_path / "run"
    process = launch(2, f"--data={data}", f"--out={run}", "--steps=200", *FLAGS, "--overwrite", restarts=1)
    _started(run, process, 4)
    os.kill(children(process)[-1], signal.SIGKILL)
    code, output = ended(process)
    assert code == 0, output
    assert output.count(f"resuming {run} at step") == 1
    assert "done: step 200" in output
    both = losses(run)
    assert sorted(both) == list(range(2, 201, 2))
    assert {step: both[step] for step in (2, 4, 6, 8)} == pytest.approx(losses(alone), rel=1e-4)


def test_processes_that_start_again_do_not_meet_those_that_have_ended():
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    wait = datetime.timedelta(seconds=20)

    def agree(rank):
        own = torch.distributed.TCPStore("localhost", store.port, is_master=False)
        time.sleep(0.1 * rank)  # the first sees what was left by the earlier ones, before the others are there
        return agree_on_attempt(own, rank, 3, wait)

    with ThreadPoolExecutor(3) as pool:
        attempts = [list(pool.map(agree, range(3))) for _ in range(3)]
    assert [len(set(attempt)) for attempt in attempts] == [1, 1, 1]
    assert len({attempt[0] for attempt in attempts}) == 3
    with pytest.raises(RuntimeError, match=r"not all of 3 processes were there within 0\.1 s"):
        agree_on_attempt(store, 1, 3, datetime.timedelta(seconds=0.1))


def test_an_attempt_that_failed_before_its_first_checkpoint_begins_anew(data, alone, tmp_path, monkeypatch):
    run = tmp_path / "run"
    flags = [f"--data={data}", f"--out={run}", "--steps=8", *FLAGS]
    assert train(*flags) == 0
    shutil.rmtree(run / "checkpoints")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(*flags, "--overwrite") == 0
    assert losses(run) == losses(alone)
    assert torch.equal(weights(run)["pos_embed"], weights(alone)["pos_embed"])
    assert list(run.parent.glob("run.old*")) == []


@pytest.mark.parametrize("whom", ["a process", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_request_to_stop_stops_all(data, tmp_path, whom):
    run = tmp_path / "run"
    process = launch(2, f"--data={data}", f"--out={run}", "--steps=1000000", *FLAGS)
    _started(run, process, 4)
    os.kill(children(process)[-1] if whom == "a process" else process.pid, signal.SIGTERM)
    code, output = ended(process)
    assert (code == 0) == (whom == "a process"), output
    assert "stopped and saved at step" in output
    (step,) = {int(path.name[5:]) for path in list_checkpoints(run)[-1:]}
    assert f"stopped and saved at step {step};" in output


@pytest.mark.slow
def test_a_process_that_is_stopped_is_noticed(data, tmp_path):
    run = tmp_path / "run"
    process = launch(2, f"--data={data}", f"--out={run}", "--steps=1000000", *FLAGS, "--timeout=5")
    _started(run, process, 4)
    os.kill(children(process)[-1], signal.SIGSTOP)
    code, output = ended(process)
    assert code != 0
    assert output.count("process 0 of 2 stops, as another one has ended or has not answered for 5 s") == 1


HANGING = """
import ctypes, os, signal, torch
from layersync_kernels.sit.batch import Batch, Condition
from layersync_kernels.sit.data.base import SampleSet
from layersync_kernels.sit.spec import SampleSpec

class Hanging(SampleSet):
    batches_taken = 0

    def __len__(self):
        return 60

    def take(self, index):
        self.batches_taken += 1
        if os.environ["RANK"] == "1" and self.batches_taken == 5:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun need not wait
            ctypes.PyDLL(None).sleep(600)  # this line hangs, and keeps the GIL
        return Batch(torch.ones(len(index), 1, 4, 4), Condition(index % 3), index)

def make(config):
    return Hanging(spec=SampleSpec(1, (4, 4)), num_classes=3, class_names=["a", "b", "c"])
"""


def test_a_process_that_hangs_says_where(tmp_path):
    run, module = tmp_path / "run", tmp_path / "hanging.py"
    module.write_text(HANGING)
    flags = ["--data=hanging:make", f"--out={run}", "--steps=1000000", *FLAGS, "--no-flip", "--timeout=5"]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code, output = ended(launch(2, *flags, PYTHONPATH=path))
    assert code != 0
    assert output.count("process 0 of 2 stops, as another one has ended or has not answered for 5 s") == 1
    waited, hung = (run / "stacks" / f"rank-{rank}.txt" for rank in (0, 1))
    assert f"; {waited} shows the lines at which it waited, the files beside it those of the others" in output
    line = 1 + HANGING.splitlines().index(next(line for line in HANGING.splitlines() if "this line" in line))
    assert f'File "{module}", line {line} in take' in hung.read_text()
    assert " in fit" in waited.read_text()
    assert "hanging.py" not in waited.read_text()


def test_stacks_are_added_to_those_of_earlier_attempts_and_a_run_without_leaves_none(tmp_path, capfd):
    path = tmp_path / "stacks" / "rank-3.txt"

    def attempt(seconds):
        watchdog = Watchdog(path, seconds)
        watchdog.restart()
        end = time.monotonic() + SECONDS
        while seconds < 1 and not watchdog.written and time.monotonic() < end:
            time.sleep(0.01)
        watchdog.close()

    attempt(1000)
    assert not path.parent.exists()
    attempt(0.05)
    before = path.read_text()
    assert before.startswith(f"process {os.getpid()} on ")
    assert before.count(" in attempt") == 1
    attempt(1000)
    assert path.read_text() == before
    attempt(0.05)
    assert path.read_text().startswith(before)
    assert path.read_text().count(" in attempt") == 2
    shutil.rmtree(path.parent)
    path.parent.touch()  # no folder can be made
    attempt_to_stderr = Watchdog(path, 0.05)
    attempt_to_stderr.restart()
    end, said = time.monotonic() + SECONDS, ""
    while "(most recent call first)" not in said and time.monotonic() < end:
        said += capfd.readouterr().err
        time.sleep(0.01)
    attempt_to_stderr.close()
    assert "Timeout" in said
