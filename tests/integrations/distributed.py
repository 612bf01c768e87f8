"""Two gloo processes for tests of data-parallel wrappers."""

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


def run(function: Callable[[int], Any], folder: Path, seconds: float) -> list[Any]:
    """What a function of a module returns on each rank; processes that hang are ended.

    Args:
        function: takes the rank.
        folder: an empty one.
        seconds: for all of it; a collective that waits for the other process gives up after half of them.

    Raises:
        RuntimeError: it raised, the process died, or time is up.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(function, rank, folder, seconds)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()
    results = []
    for rank in range(WORLD):
        file = folder / f"{rank}.pt"
        if not file.exists():
            raise RuntimeError(f"process {rank} of {WORLD} died, or did not end in {seconds} s")
        failure, result = torch.load(file, weights_only=False)
        if failure:
            raise RuntimeError(f"process {rank} of {WORLD}: {failure}")
        results.append(result)
    return results


def _work(function: Callable[[int], Any], rank: int, folder: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=seconds / 2),
    )
    failure, result = "", None
    try:
        result = function(rank)
    except Exception:
        failure = traceback.format_exc()
    torch.save((failure, result), folder / f"{rank}.pt")
    dist.destroy_process_group()
