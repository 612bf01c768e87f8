"""Long runs hold no more than short ones: memory, threads and open files."""

import functools
import gc
import os
import threading
from pathlib import Path

import pytest

from layersync_kernels.sit.distributed.processes import ALONE, Processes
from layersync_kernels.sit.training.folder import start_run
from layersync_kernels.sit.training.loop import Trainer

from ..integrate.distributed import run
from .tiny import tiny_config, tiny_data

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not say what a process holds"),
]
MEGABYTES = 16
"""That a process may grow between its looks, of some 800 MB: 7,500 steps that kept 2.2 KB each would pass it."""


def held():
    """Resident memory in bytes, threads (of Python, and all) and open files of this process."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    files = len(os.listdir("/proc/self/fd"))
    return int(status["VmRSS"].split()[0]) * 1024, threading.active_count(), int(status["Threads"]), files


def trained(rank, *, folder, steps, early, world=1):
    """What is held at each checkpoint of a run after step `early`, at which the first pictures are drawn."""
    processes = ALONE if world == 1 else Processes(rank, world, world)
    log = {"log_every": 10, "checkpoint_every": early // 4, "sample_every": early, "tensorboard": True, "keep": 2}
    model = {"hidden_size": 8, "depth": 2, "num_heads": 1}
    config = tiny_config(optim={"steps": steps, "batch_size": 2}, log=log, model=model)
    trainer = Trainer(config, tiny_data(), processes=processes, run_dir=folder / "run")
    processes.by_first(lambda: start_run(folder / "run", config, overwrite=False) or "")
    found = []
    save = trainer.save

    def looking(**options):
        if trainer.steps_done > early:  # when the last one is long written; log and data are open
            found.append(held())
            print(trainer.steps_done, found[-1], flush=True)
        return save(**options)

    trainer.save = looking
    trainer.fit()
    return found


def check(found):
    memory, *first = found[0]
    grown, *last = map(min, zip(*found[-len(found) // 4 :], strict=True))  # what leaks does not come back
    assert last == first
    assert grown - memory < MEGABYTES * 1e6


def test_ten_thousand_steps_hold_what_two_thousand_hold(tmp_path):
    check(trained(0, folder=tmp_path, steps=10_000, early=2_000))


def test_nor_do_two_processes_grow(tmp_path):
    function = functools.partial(trained, folder=tmp_path, steps=1_000, early=200, world=2)
    for found in run(function, tmp_path, 600, world=2):
        check(found)
