"""Peak memory of a method, in a process of its own."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from ...config.run import TrainConfig
from ...device import resolve_device
from ...training.loop import Trainer
from .config import CompareConfig, load_sets

logger = logging.getLogger(__name__)

_MEMORY_STEPS = 3


def measure_memory(config: CompareConfig, run: TrainConfig) -> int | None:
    """Bytes that training takes at its peak, in a new process: in this one, what others left would hide it.

    Returns:
        None where it cannot be told: without /proc, or when the process was killed.
    """
    run = dataclasses.replace(run, threads=run.threads or torch.get_num_threads())
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_peak_memory, config, run).result()
        except BrokenProcessPool as error:
            logger.warning("the memory of a method could not be measured: %s", error)
            return None


def _peak_memory(config: CompareConfig, run: TrainConfig) -> int | None:
    """Bytes that a few steps take beyond what the process had before them; runs in the new process."""
    device = resolve_device(run.device)
    data, _ = load_sets(config, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        Trainer(run, data).advance(_MEMORY_STEPS)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading the data
        before = _resident("VmRSS")
        Trainer(run, data).advance(_MEMORY_STEPS)
        return _resident("VmHWM") - before
    except OSError:
        return None


def _resident(entry: str) -> int:
    """An entry of this process's status in bytes. (`getrusage` starts from the peak of the process that forked it.)"""
    found = re.search(rf"^{entry}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {entry}")
    return 1024 * int(found[1])
