"""The memory in which a divided model starts: `python benchmarks/start_memory.py [--model SiT-XXL/2] [--depth 4 8 12]`.

Processes of one thread each, over gloo, build a SiT with `--parallel fsdp`, its average and its optimiser, give each
parameter a gradient, and take the first step of AdamW, after which the moments are there. From before the model is
built until then are measured, of each process: the most bytes of tensors at a time, as PyTorch's allocator hands them
out, and the most of its memory that was resident (VmHWM), beyond what was resident before. A process's share is 20
bytes a parameter (weights, average, gradient, two moments, in fp32) over the number of processes; beside it one whole
tensor, and the own part of it, may be there while weights are drawn.

With several depths the slope says what a parameter costs, without what a process needs in any case. Linux alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from layersync_kernels.bench.machine import machine_facts
from layersync_kernels.bench.memory import most_held
from layersync_kernels.runtime.memory import keep_freed_memory
from layersync_kernels.sit.config.model import ModelConfig
from layersync_kernels.sit.config.optim import OptimConfig
from layersync_kernels.sit.config.parallel import ParallelConfig
from layersync_kernels.sit.distributed.parallel import Parallel
from layersync_kernels.sit.distributed.processes import Processes
from layersync_kernels.sit.models.registry import build_model, sit_models
from layersync_kernels.sit.spec import SampleSpec
from layersync_kernels.sit.training.state import TrainState

BYTES = 20
"""Of each parameter, in fp32: weight, average, gradient, two moments."""


def start(make: Any, processes: Processes) -> TrainState:
    """A divided model and all that training keeps of it, after a first step of its optimiser."""
    parallel = Parallel(ParallelConfig(parallel="fsdp"), processes, torch.device("cpu"), dtype=None)
    state = TrainState(parallel.build(make), [], OptimConfig(), seed=0, parallel=parallel)
    for parameter in state.trained:
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return state


def _resident(name: str) -> int:
    """Bytes, of /proc/self/status: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _work(rank: int, world: int, model: str, depth: int | None, folder: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    make = functools.partial(build_model, ModelConfig(model=model, depth=depth), SampleSpec(4, (32, 32)), 1000)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = _resident("VmRSS")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        state = start(make, Processes(rank, world, world))
    found = {
        "resident": _resident("VmHWM") - before,
        "before": before,
        "held": most_held(profiler),
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "largest": max(parameter.numel() for parameter in state.model.parameters()),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(model: str, depth: int | None, world: int) -> dict[str, Any]:
    """Bytes in the process that took most of them; `share`: 20 bytes a parameter over processes; `whole`: a tensor."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (world, model, depth, folder), nprocs=world)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    row = {name: max(own[name] for own in ranks) for name in ranks[0]}
    share, whole = BYTES * row["parameters"] // world, 4 * row["largest"]
    return {"model": model, "depth": depth, "processes": world, **row, "share": share, "whole": whole}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-XXL/2", choices=sit_models)
    parser.add_argument("--depth", type=int, nargs="*", help="numbers of blocks, in place of the model's own")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    print("blocks  parameters, M  share, MB  + a whole tensor  tensors at most  resident at most  resident before")
    for depth in given.depth or [None]:
        rows.append(row := measure(given.model, depth, given.processes))
        sizes = [row["share"], row["share"] + row["whole"], row["held"], row["resident"], row["before"]]
        share, whole, held, resident, before = (f"{size / 1e6:.1f}" for size in sizes)
        print(
            f"{'all' if depth is None else depth:>6}  {row['parameters'] / 1e6:13.1f}  {share:>9}  {whole:>16}"
            f"  {held:>15}  {resident:>16}  {before:>15}",
            flush=True,
        )
    if len(rows) > 1:
        more = rows[-1]["parameters"] - rows[0]["parameters"]
        slopes = ((rows[-1][name] - rows[0][name]) / more for name in ("held", "resident"))
        held, resident = slopes
        share = BYTES / given.processes
        print(f"bytes of a parameter: {held:.2f} of tensors, {resident:.2f} resident; its share is {share:g}")
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": machine_facts("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
