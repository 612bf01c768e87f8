"""A run in a process of its own, which waits after each step."""

from __future__ import annotations

import contextlib
import subprocess
import sys

SLOW_RUN = """
import sys, time, torch
from layersync_kernels import cli
from layersync_kernels.sit.training.loop import Trainer
step = Trainer.step
def slow(self, batch):
    step(self, batch)
    print("step", self.steps_done, file=sys.__stdout__, flush=True)  # the progress bar takes sys.stdout
    end = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < end:  # a signal just before a long sleep would be handled only after it
        time.sleep(0.01)
Trainer.step = slow
sys.exit(cli.main(sys.argv[2:]))
"""


@contextlib.contextmanager
def slow_run(run, pause, *, before="", stderr=subprocess.PIPE):
    """A training process that has done its first step, and sleeps after each; what it does `before` is Python."""
    size = ["--image-size=4", "--model=SiT-P/2", "--hidden-size=8", "--num-heads=2", "--depth=2", "--batch-size=2"]
    command = [
        sys.executable,
        "-c",
        before + SLOW_RUN,
        str(pause),
        "train",
        "--out",
        str(run),
        *size,
        "--no-tensorboard",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        while (line := process.stdout.readline()) and not line.startswith("step"):
            pass
        assert line, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()
