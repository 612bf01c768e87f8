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
def slow(self, *batch):
    step(self, *batch)
    print("step", self.steps_done, flush=True)
    end = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < end:  # a signal just before a long sleep would be handled only after it
        time.sleep(0.01)
Trainer.step = slow
sys.exit(cli.main(sys.argv[2:]))
"""


@contextlib.contextmanager
def slow_run(run, pause):
    """A training process that has done its first step, and sleeps after each."""
    size = ["--image-size=4", "--model=SiT-P/2", "--hidden-size=8", "--num-heads=2", "--depth=2", "--batch-size=2"]
    command = [sys.executable, "-c", SLOW_RUN, str(pause), "train", "--out", str(run), *size, "--no-tensorboard"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while (line := process.stdout.readline()) and not line.startswith("step"):
            pass
        assert line, process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()
