"""Runs that are killed again and again: what they end with is what they would have ended with (`make test-faults`)."""

import os
import random
import signal
import time

import pytest
import torch

from layersync_kernels.sit.checkpoints.local import check_checkpoint, list_checkpoints
from layersync_kernels.sit.training.runlog import read_records

from .test_launched import FLAGS, children, data, ended, launch  # noqa: F401
from .tiny import saved

pytestmark = pytest.mark.faults
KILLS = 20
STEPS = 800
SECONDS = 120
SEED = int(os.environ.get("LAYERSYNC_FAULT_SEED", "0"))
OFTEN = ["--checkpoint-every=15", "--sample-every=40", "--keep=3", f"--steps={STEPS}", "--sampling-steps=8"]


def command(data, run, parallel):  # noqa: F811
    return [f"--data={data}", f"--out={run}", f"--parallel={parallel}", *FLAGS, *OFTEN]


def final(run):
    checkpoint = list_checkpoints(run)[-1]
    check_checkpoint(checkpoint)
    return {f"{stem}.{name}": tensor for stem, named in saved(run).items() for name, tensor in named.items()}


def step_of(run):
    return max((record["step"] for record in read_records(run)), default=0)


def wait_for(moment, process, run, beyond):
    """Waits until the run is past that step, and then for the moment; False where it has ended before."""
    end = time.monotonic() + SECONDS
    while step_of(run) <= beyond:
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.02)
    folder = {"a save": run / "checkpoints", "sampling": run / "samples"}.get(moment)
    if folder is None:
        time.sleep(random.random())
        return True
    before = set(os.listdir(folder)) if folder.exists() else set()
    while process.poll() is None and time.monotonic() < end:
        if folder.exists() and set(os.listdir(folder)) - before:  # a temporary name, most often
            return True
        time.sleep(0.002)
    return False


@pytest.mark.parametrize(("world", "parallel"), [(2, "ddp"), (2, "fsdp")])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(data, tmp_path, parallel, world):  # noqa: F811
    whole, run = tmp_path / "whole", tmp_path / "run"
    code, output = ended(launch(world, *command(data, whole, parallel)), 900)
    assert code == 0, output
    random.seed(SEED)
    process, resume, done = None, [], []
    while len(done) < KILLS:
        if process is None:
            process = launch(world, *command(data, run, parallel), *resume, restarts=KILLS)
        whom = random.choice(["one", "one", "all", "torchrun"])
        moment = random.choice(["a step", "a save", "sampling"])
        beyond = max(step_of(run), 15)  # nothing goes on from before the first checkpoint
        if not wait_for(moment, process, run, beyond):
            break
        own = children(process)
        victims = {"one": [random.choice(own)] if own else [], "all": own, "torchrun": [process.pid, *own]}[whom]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        done.append((whom, moment, step_of(run)))
        if whom == "torchrun":
            process.communicate()
            process, resume = None, ["--resume"]
    print(f"seed {SEED}, {parallel}: killed", *done, sep="\n")
    if process is None:
        process = launch(world, *command(data, run, parallel), *resume)
    code, output = ended(process, 900)
    assert code == 0, output
    assert len(done) == KILLS, "it came to its end before all kills; give it more steps"
    mine, theirs = final(run), final(whole)
    assert mine.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(mine[name], tensor)] == []
    assert [r["step"] for r in read_records(run)] == [r["step"] for r in read_records(whole)]
    losses = [[record["loss"] for record in read_records(folder)] for folder in (run, whole)]
    # Of a mean over steps that a checkpoint divides, that checkpoint holds the sum over processes: another rounding.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert not [p for p in (run / "checkpoints").iterdir() if not p.name.startswith("step_")]
