"""The model of `layersync scale` against processes of this machine: `python benchmarks/scale_check.py [--json FILE]`.

A small SiT is trained by 1, 2 and 4 processes of one thread each, with DistributedDataParallel over gloo. Measured are
the passes and the update of one process alone, the bytes of the buckets, and all-reduces of those sizes between the
steps; the model makes a step of that, which is compared with the measured one. All processes share the cores of one
machine. Compute slows by processes over cores, which the model is told. What they lose beyond that, to each other's
caches and to whatever else runs there, it is not; so steps without communication (`no_sync`) are measured in turns with
those that have it, and there is a prediction from their time too. gloo computes on the same cores, so how much hides is
open: predictions are given with all communication exposed, and with as much hidden as could be.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layersync_kernels.bench.machine import machine_facts
from layersync_kernels.bench.scale.count import units_of
from layersync_kernels.bench.scale.inputs import Inputs
from layersync_kernels.bench.scale.links import Link
from layersync_kernels.bench.scale.model import estimate
from layersync_kernels.sit.models.registry import sit_models
from layersync_kernels.sit.models.sit import SiT

SMALL = 1 << 10
"""Bytes of an all-reduce whose time is all latency."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained, and how it is measured.

    Attributes:
        model: name of `sit_models`.
        side: of latents (4, side, side).
        batch: of each process.
        bucket_mb: of DistributedDataParallel.
        steps: measured, of which medians are taken.
    """

    model: str
    side: int
    batch: int
    bucket_mb: int
    steps: int


def _build(setting: Setting) -> SiT:
    torch.manual_seed(0)
    return sit_models[setting.model](input_size=setting.side).train()


def _milliseconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - began)


class Steps:
    """Training steps on one batch.

    Args:
        model: called with samples, times and labels.
        setting: of the batch.
    """

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        self.model, self.loss = model, torch.zeros(())
        self.inputs = (
            torch.randn(setting.batch, 4, setting.side, setting.side),
            torch.rand(setting.batch),
            torch.arange(setting.batch),
        )
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def forward(self) -> None:
        """Leaves a loss."""
        self.loss = self.model(*self.inputs).square().mean()

    def backward(self) -> None:
        """Leaves gradients."""
        self.loss.backward()

    def update(self) -> None:
        """Leaves new weights."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        """All of it."""
        self.forward()
        self.backward()
        self.update()


def alone(setting: Setting) -> dict[str, float]:
    """Medians in milliseconds of a process that has the machine to itself: forward, backward, update."""
    steps = Steps(_build(setting), setting)
    for _ in range(3):
        steps()
    parts = {"forward_ms": steps.forward, "backward_ms": steps.backward, "update_ms": steps.update}
    times = [{name: _milliseconds(part) for name, part in parts.items()} for _ in range(setting.steps)]
    return {name: statistics.median(row[name] for row in times) for name in parts}


def _together(count: int, *functions: Callable[[], Any]) -> list[float]:
    """Medians in milliseconds of functions that take turns, and that all processes begin together."""
    times: list[list[float]] = []
    for _ in range(count):
        times.append([])
        for function in functions:
            dist.barrier()
            times[-1].append(_milliseconds(function))
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _work(rank: int, world: int, setting: Setting, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    wrapped = DistributedDataParallel(_build(setting), bucket_cap_mb=setting.bucket_mb, gradient_as_bucket_view=True)
    steps = Steps(wrapped, setting)
    for _ in range(3):
        steps()
    # After the first step, in the order in which gradients come.
    sizes = [int(size) for size in wrapped._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")]

    def without_communication() -> None:
        with wrapped.no_sync():
            steps()

    payloads = sorted({SMALL, *sizes})
    reduces = [functools.partial(dist.all_reduce, torch.zeros(size // 4)) for size in payloads]
    turns: list[Callable[[], Any]] = [steps, without_communication, *reduces]
    _together(1, *turns)
    step_ms, silent_ms, *reduced_ms = _together(setting.steps, *turns)
    if rank == 0:
        found = {
            "step_ms": step_ms,
            "silent_ms": silent_ms,
            "buckets": sizes,
            "all_reduce_ms": dict(zip(payloads, reduced_ms, strict=True)),
        }
        Path(folder, f"{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def together(setting: Setting, world: int) -> dict[str, Any]:
    """What so many processes took, medians of one of them.

    Returns:
        step_ms; silent_ms, of a step without communication; buckets, in bytes; all_reduce_ms, by bytes.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (world, setting, folder), nprocs=world)
        found = json.loads(Path(folder, f"{world}.json").read_text())
    return {**found, "all_reduce_ms": {int(size): ms for size, ms in found["all_reduce_ms"].items()}}


def fitted_link(measured: dict[str, Any], world: int) -> Link:
    """The link of a ring that takes as long as the small all-reduce and all those of a step did."""
    if world == 1:
        return Link("none", 1.0, 0.0, "one process sends nothing", "one process waits for none")
    times, buckets = measured["all_reduce_ms"], measured["buckets"]
    latency = times[SMALL]
    sent = 2 * (world - 1) / world * sum(buckets)
    bandwidth_ms = max(sum(times[size] for size in buckets) - latency * len(buckets), 1e-3)
    return Link("gloo", sent / bandwidth_ms / 1e6, 1e3 * latency / (2 * (world - 1)), "measured", "measured")


def compare(setting: Setting, worlds: list[int], cores: int) -> list[dict[str, Any]]:
    """A row for each number of processes. One is measured before and after the others, and the mean is taken."""
    with torch.device("meta"):
        units = units_of(sit_models[setting.model](input_size=setting.side))
    first = alone(setting)
    measured = {world: together(setting, world) for world in worlds}
    last = alone(setting)
    times = {name: (first[name] + last[name]) / 2 for name in first}
    rows = []
    for world in worlds:
        own = measured[world]
        link = fitted_link(own, world)
        inputs = Inputs(
            gpus=world, gpus_per_node=world, strategy="ddp", units=units, batch=setting.batch,
            forward_ms=times["forward_ms"], backward_ms=times["backward_ms"], update_ms=times["update_ms"],
            intra=link, inter=link, parameter_bytes=4, gradient_bytes=4, ema_copies=0, bucket_mb=setting.bucket_mb,
            cores=cores,
        )  # fmt: skip
        slower = own["silent_ms"] / sum(times.values())
        crowded = dataclasses.replace(inputs, cores=None, **{name: slower * ms for name, ms in times.items()})
        row = {"processes": world, "measured_ms": own["step_ms"], "silent_ms": own["silent_ms"]}
        for name, given in (("cores", inputs), ("silent", crowded)):
            exposed, hidden = (estimate(dataclasses.replace(given, overlap=overlap)) for overlap in (0.0, 1.0))
            row |= {f"{name}_exposed_ms": exposed.step_ms, f"{name}_hidden_ms": hidden.step_ms}
        row |= {"communication_ms": exposed.communication_ms, "sent_bytes": exposed.wire_bytes}
        rows.append({**row, "alone": {"first": first, "last": last}, "measured": own, "link": dataclasses.asdict(link)})
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-P/2", choices=sit_models)
    parser.add_argument("--side", type=int, default=16, help="of the latents")
    parser.add_argument("--batch", type=int, default=8, help="of each process")
    parser.add_argument("--bucket-mb", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cores", type=int, help="that no other work takes; by default all that there are")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(given.model, given.side, given.batch, given.bucket_mb, given.steps)
    cores = given.cores or len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    rows = compare(setting, given.processes, cores)
    print(f"{setting}, {cores} free cores; milliseconds of a step; predictions: most hidden to all exposed")
    print("processes  measured  predicted from cores  without communication  predicted from that  all-reduces  MB sent")
    for row in rows:
        ranges = (f"{row[f'{name}_hidden_ms']:.1f} to {row[f'{name}_exposed_ms']:.1f}" for name in ("cores", "silent"))
        from_cores, from_silent = ranges
        print(
            f"{row['processes']:9d}  {row['measured_ms']:8.1f}  {from_cores:>20}  {row['silent_ms']:21.1f}"
            f"  {from_silent:>19}  {row['communication_ms']:11.1f}  {row['sent_bytes'] / 1e6:7.2f}"
        )
    first, last = rows[0]["alone"]["first"], rows[0]["alone"]["last"]
    print("one process, first and last:", {name: (round(first[name], 2), round(last[name], 2)) for name in first})
    print(f"load of the machine before: {load:.2f}")
    if given.json is not None:
        facts = {"cores": cores, "load": load, "machine": machine_facts("cpu")}
        content = {"setting": dataclasses.asdict(setting), **facts, "rows": rows}
        given.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
