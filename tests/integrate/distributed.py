"""Gloo processes for tests of what several processes do together."""

import datetime
import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2


def run(
    function: Callable[[int], Any], folder: Path, seconds: float, attempts: int = 2, world: int = WORLD
) -> list[Any]:
    """What a function of a module returns on each rank; processes that hang are ended.

    Args:
        function: takes the rank.
        folder: an empty one.
        seconds: for an attempt; a collective that waits for the other process gives up after half of them.
        world: how many processes.
        attempts: how often to start when a process is killed by a signal: once in a dozen runs of the matrix the thread
            of gloo itself crashed (torch 2.14.1). What the function raises is never tried again.

    Raises:
        RuntimeError: it raised, the process died, or time is up.
    """
    for attempt in range(attempts):
        place = folder / str(attempt)
        place.mkdir()
        codes = _start(function, place, seconds, world)
        if not any(code is not None and code < 0 for code in codes):
            break
    results = []
    for rank, code in enumerate(codes):
        file = place / f"{rank}.pt"
        if not file.exists():
            why = f"did not end in {seconds} s" if code is None else f"ended with code {code}"
            raise RuntimeError(f"process {rank} of {world} {why}")
        failure, result = torch.load(file, weights_only=False)
        if failure:
            raise RuntimeError(f"process {rank} of {world}: {failure}")
        results.append(result)
    return results


def _start(function: Callable[[int], Any], folder: Path, seconds: float, world: int) -> list[int | None]:
    """The exit code of each process; None where time was up."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(function, rank, folder, seconds, world)) for rank in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _work(function: Callable[[int], Any], rank: int, folder: Path, seconds: float, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds / 2),
    )
    failure, result = "", None
    try:
        result = function(rank)
    except Exception:
        failure = traceback.format_exc()
    torch.save((failure, result), folder / f"{rank}.pt")
    dist.destroy_process_group()
