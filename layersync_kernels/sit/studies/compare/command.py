"""`layersync compare`: prepares a comparison, trains it on one device or several, and reports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...config.paths import with_absolute_paths
from ...console import console
from ...device import resolve_device
from ...training.folder import lock_folder
from ...training.signals import stop_signals
from .config import SETTINGS, CompareCommand, CompareConfig
from .devices import Call, side_by_side
from .folder import check_folder, start_folder
from .pilot import estimate, print_pilot
from .run import PLAN, Comparison


def prepare(config: CompareConfig, out: Path, *, resume: bool = False, overwrite: bool = False) -> Comparison:
    """A comparison whose settings have been tried, in its folder. Until that is so, nothing is written or deleted.

    The folder is the caller's to lock.

    Raises:
        UserError: settings, data or teachers that cannot be used; see `check_folder` for the folder.
    """
    config = with_absolute_paths(config)
    config.validate()
    check_folder(config, out, resume=resume, overwrite=overwrite)
    comparison = Comparison(config, out)
    if overwrite or not (out / SETTINGS).is_file():
        comparison.check()
    start_folder(config, out, overwrite=overwrite)
    return comparison


def compare(command: CompareCommand) -> Path | None:
    """Trains, measures and reports as `command` asks: the path of the report, or None when stopped before the end.

    Raises:
        UserError: whatever can be put right: settings, data, folders, a full disk, a loss that is not finite.
    """
    devices = command.devices or (command.comparison.train.device,)
    for device in devices:
        resolve_device(device)
    with contextlib.ExitStack() as locks:
        locks.enter_context(lock_folder(command.out))
        comparison = prepare(command.comparison, command.out, resume=command.resume, overwrite=command.overwrite)
        for run in comparison.runs:  # `layersync train` can go on with them, too
            locks.enter_context(lock_folder(run.folder))
        memory = comparison.memory()
        with stop_signals() as stop_asked:
            pilot = None
            if not (command.out / PLAN).is_file() and comparison.config.pilot and not comparison.begun:
                console.print("the pilot: how many seeds would it take?")
                small = comparison.small()
                if not train_on(small, devices, stop_asked):
                    return None
                pilot = estimate(small.config, small.runs, comparison.config.seeds)
                print_pilot(pilot)
            plan = comparison.plan(pilot)
            finished = train_on(comparison, devices, stop_asked)
        return comparison.report(memory, plan) if finished else None


def train_on(comparison: Comparison, devices: Sequence[str], stop_asked: Callable[[], int]) -> bool:
    """Trains the runs of each seed on one of the devices; False when stopped before the end."""
    seeds = comparison.seeds
    shares = [seeds[i :: len(devices)] for i in range(min(len(devices), len(seeds)))]
    if len(shares) == 1:
        return comparison.train(stop_asked)
    threads = max(1, torch.get_num_threads() // len(shares))
    calls = [
        Call(_train_seeds, (comparison.config, comparison.out, device, share, threads))
        for device, share in zip(devices, shares, strict=False)
    ]
    finished = side_by_side(calls, stop_asked)
    comparison.read()
    return finished


def _train_seeds(
    config: CompareConfig, out: Path, device: str, seeds: list[int], threads: int, stop_asked: Callable[[], int]
) -> bool:
    """In a process of its own."""
    torch.set_num_threads(config.train.threads or threads)
    return Comparison(config, out, device=device).train(stop_asked, seeds)
