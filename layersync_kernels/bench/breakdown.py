"""`layersync bench trainer --breakdown`: where the time of the trainer's steps goes.

What runs is `Trainer.fit`; its phases are ranges of PyTorch's profiler (`sit/training/phases.py`), and all times are
those of the profiler's events. On a CPU a phase takes the wall time of its ranges. On a GPU, which works later than it
is asked to, it takes the kernels that were launched inside of its ranges; what is left of a step is the time in which
no kernel ran.

Communication is told from computation as Holistic Trace Analysis does it (https://hta.readthedocs.io): exposed is the
time in which a collective runs, or waits for another process, and this process computes nothing. On a CPU collectives
are gloo's ranges, and computing is what operators do that call no others (Python between two of them counts as waiting
while a collective runs); on a GPU both are kernels. Exposed communication is no part of the phase in which it came, so
that phases and the rest sum up to the step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..errors import UserError
from ..sit.config import at_least
from ..sit.config.model import ModelConfig
from ..sit.config.optim import OptimConfig
from ..sit.config.parallel import ParallelConfig
from ..sit.config.run import LogConfig, TrainConfig
from ..sit.distributed.processes import Processes
from ..sit.training.loop import Trainer
from ..sit.training.phases import PHASES, phase_of
from .machine import machine_facts
from .report import new_table
from .throughput import SETTINGS, latents

COMMUNICATION, REST = "communication", "rest"
ROWS = (*PHASES[:3], COMMUNICATION, *PHASES[3:], REST)
"""Rows of the table, in the order of a step."""
_NO_COMPUTE = (
    "autograd",
    "FSDP",
    "c10d",
    "_c10d_functional",
)  # namespaces of operators that launch, wait or call others
_WARMUP = 3  # steps: DDP makes its buckets anew after the first one, torch.compile compiles in it

Intervals = list[tuple[int, int]]
"""Nanoseconds from and to, in order and apart."""


@dataclass(frozen=True)
class Times:
    """Nanoseconds of some steps.

    Attributes:
        whole: from the first batch that is asked for to the end of the last record.
        phases: of each of `ROWS`; they sum up to `whole`.
        host: wall time of the ranges of each phase.
        hidden: in which communication ran beside computation.
    """

    whole: int
    phases: dict[str, int]
    host: dict[str, int]
    hidden: int


def joined_up(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """The union of intervals."""
    found: Intervals = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif end > start:
            found.append((start, end))
    return found


def without(intervals: Intervals, others: Intervals) -> Intervals:
    """What of some intervals lies in none of others."""
    edges = [(start, 0, 1) for start, _ in intervals] + [(end, 0, -1) for _, end in intervals]
    edges += [(start, 1, 1) for start, _ in others] + [(end, 1, -1) for _, end in others]
    found: Intervals = []
    inside, before = [0, 0], 0
    for at, which, change in sorted(edges):
        if inside == [1, 0] and at > before:
            found.append((before, at))
        inside[which] += change
        before = at
    return found


def _length(intervals: Intervals) -> int:
    return sum(end - start for start, end in intervals)


def _span(event: Any) -> tuple[int, int]:
    return event.start_ns(), event.end_ns()


def _leaves(events: Iterable[Any]) -> Iterator[Any]:
    """The operators that call no others, of each thread."""
    threads: dict[int, list[Any]] = {}
    for event in events:
        threads.setdefault(event.start_thread_id(), []).append(event)
    for own in threads.values():
        own.sort(key=lambda event: (event.start_ns(), -event.end_ns()))
        for event, following in zip(own, [*own[1:], None], strict=True):
            if following is None or following.start_ns() >= event.end_ns():
                yield event


def _on_cpu(
    events: Sequence[Any], ranges: Mapping[str, Intervals]
) -> tuple[dict[str, Intervals], Intervals, Intervals]:
    """What each phase has, collectives, and what computes."""
    collectives = [event for event in events if event.name().startswith("gloo:")]
    threads = {event.start_thread_id() for event in collectives}
    operators = [event for event in events if "::" in event.name() and event.start_thread_id() not in threads]
    compute = [event for event in _leaves(operators) if event.name().split("::")[0] not in _NO_COMPUTE]
    return dict(ranges), joined_up(map(_span, collectives)), joined_up(map(_span, compute))


def _on_gpu(
    events: Sequence[Any], ranges: Mapping[str, Intervals]
) -> tuple[dict[str, Intervals], Intervals, Intervals]:
    """The same of kernels, copies and fills; each belongs to the phase in which the host has launched it."""
    hosts = [event for event in events if event.device_type() == DeviceType.CPU]
    calls = {event.correlation_id(): event.start_ns() for event in hosts if event.name().startswith(("cuda", "cuL"))}
    operators = {event.correlation_id(): event.start_ns() for event in hosts if "::" in event.name()}
    phases: dict[str, Intervals] = {name: [] for name in ranges}
    collectives: Intervals = []
    compute: Intervals = []
    for event in events:
        if event.device_type() == DeviceType.CPU or event.is_user_annotation():
            continue
        (collectives if "nccl" in event.name() else compute).append(_span(event))
        launched = calls.get(event.correlation_id(), operators.get(event.linked_correlation_id(), -1))
        for name, own in ranges.items():
            if any(start <= launched < end for start, end in own):
                phases[name].append(_span(event))
    if not compute:
        raise UserError(
            "--breakdown: the profiler has seen no kernel; another profiler may hold the GPU, or its counters may be "
            "for administrators alone (NVreg_RestrictProfilingToAdminUsers)"
        )
    return {name: joined_up(own) for name, own in phases.items()}, joined_up(collectives), joined_up(compute)


def times_of(events: Sequence[Any], device: str) -> Times:
    """Reads the profiler's raw events of some steps.

    Args:
        events: of kineto, of one process.
        device: "cpu" or "cuda".

    Raises:
        UserError: there are no phases in them, or no kernels of a GPU.
    """
    found: dict[str, Intervals] = {name: [] for name in PHASES}
    for event in events:
        if event.device_type() == DeviceType.CPU and (name := phase_of(event.name())) is not None:
            found[name].append(_span(event))
    if missing := [name for name, own in found.items() if not own]:
        raise UserError(
            f"--breakdown: the profiler's events have no {', '.join(missing)}; expected {', '.join(PHASES)}"
        )
    ranges = {name: joined_up(own) for name, own in found.items()}
    begin, end = ranges["data"][0][0], max(own[-1][1] for own in ranges.values())
    phases, collectives, compute = (_on_cpu if device == "cpu" else _on_gpu)(events, ranges)
    outside: Intervals = [(0, begin), (end, max(end, max(event.end_ns() for event in events)) + 1)]
    collectives = without(collectives, outside)
    exposed = without(collectives, compute)
    counted = joined_up([*exposed, *outside])
    times = {COMMUNICATION: _length(exposed)}
    for name in PHASES:
        own = without(phases[name], counted)
        times[name] = _length(own)
        counted = joined_up([*counted, *own])
    times[REST] = end - begin - sum(times.values())
    host = {name: _length(own) for name, own in ranges.items()}
    return Times(end - begin, times, host, _length(collectives) - _length(exposed))


def _fit(trainer: Trainer, steps: int) -> float:
    """Goes on for some steps, with a record at the last one; seconds of a step."""
    config, last = trainer.config, trainer.steps_done + steps
    trainer.config = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, steps=last),
        log=dataclasses.replace(config.log, log_every=last),
    )
    began = time.perf_counter()
    trainer.fit()  # which ends by reading the device
    return (time.perf_counter() - began) / steps


def breakdown(trainer: Trainer, steps: int) -> tuple[Times, float]:
    """Where the time of some steps goes, in this process, and what a step takes.

    Args:
        trainer: without a run folder; in each of its processes the same is asked for.
        steps: measured.

    Returns:
        the times of all steps, and the seconds of a step without the profiler.
    """
    trainer.advance(trainer.steps_done + _WARMUP)
    plain = _fit(trainer, steps)
    gpu = trainer.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        _fit(trainer, steps)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    return times_of(profiler.profiler.kineto_results.events(), trainer.device.type), plain


def measure(
    device: torch.device,
    processes: Processes,
    *,
    model: str | None = None,
    batch: int | None = None,
    parallel: str = "ddp",
    precision: str = "auto",
    steps: int = 15,
) -> list[dict[str, object]]:
    """Steps of the reference trainer on random latents (4, 32, 32).

    Args:
        device: of this process.
        processes: that train together; each calls this.
        model: name of a SiT; by default that of `layersync bench trainer`.
        batch: samples of a step of all processes; by default those of `layersync bench trainer` for each of them.
        parallel: "ddp", "fsdp" or "hsdp".
        precision: as the trainer has it.
        steps: measured, once without the profiler and once under it.

    Returns:
        a row for each of `ROWS`, means over steps of this process: `ms`; `share` of the step; `host_ms`, wall time of
        its ranges, None of what has no ranges; `hidden_ms` of communication; and in each of them `step_ms`, which the
        `ms` sum up to, and `unprofiled_ms`, what a step takes without the profiler.

    Raises:
        UserError: settings that do not work.
    """
    at_least(1, rounds=steps, batch=batch)
    own_model, own_batch = SETTINGS[device.type]
    model, batch = model or own_model, batch or own_batch * processes.world
    config = TrainConfig(
        model=ModelConfig(model=model),
        optim=OptimConfig(batch_size=batch),
        log=LogConfig(sample_every=0),
        parallel=ParallelConfig(parallel=parallel),  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        device=device.type,
    )
    trainer = Trainer(config, latents(batch, device), processes=processes, device=device)
    times, plain = breakdown(trainer, steps)
    many = "" if processes.world == 1 else f", {processes.world} processes ({parallel})"
    arithmetic = str(trainer.autocast_dtype or torch.float32).removeprefix("torch.")
    common = {
        "op": "trainer breakdown", "case": f"{model} batch {batch} {arithmetic}{many}", "device": device.type,
        "steps": steps, "processes": processes.world, "parallel": parallel if processes.world > 1 else None,
        "step_ms": times.whole / steps / 1e6, "unprofiled_ms": 1e3 * plain, "problem": None,
        "machine": machine_facts(device.type),
    }  # fmt: skip
    rows: list[dict[str, object]] = []
    for name in ROWS:
        host = times.host.get(name)
        row: dict[str, object] = {"phase": name, "ms": times.phases[name] / steps / 1e6}
        row |= {"share": times.phases[name] / times.whole, "host_ms": None if host is None else host / steps / 1e6}
        row["hidden_ms"] = times.hidden / steps / 1e6 if name == COMMUNICATION else None
        rows.append(row | common)
    return rows


def print_table(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The rows of `measure`."""
    first = rows[0]
    gpu = first["device"] != "cpu"
    what = "kernels" if gpu else "wall time"
    console.print(f"trainer, {first['case']}, {first['device']}: {what} of a step", highlight=False)
    table = new_table(f"mean of {first['steps']}", "phase", "ms", "%", *(["host ms"] if gpu else []))
    for row in rows:
        numbers = [f"{row['ms']:.2f}", f"{100 * row['share']:.1f}"]
        if gpu:
            numbers.append("" if row["host_ms"] is None else f"{row['host_ms']:.2f}")
        table.add_row(row["phase"], *numbers)
    table.add_row("step", f"{first['step_ms']:.2f}", "100.0", *([""] if gpu else []))
    console.print(table)
    hidden = next(row["hidden_ms"] for row in rows if row["phase"] == COMMUNICATION)
    console.print(
        f"A step took {first['unprofiled_ms']:.2f} ms without the profiler. Communication is what this process waited "
        f"for; {hidden:.2f} ms more of it ran beside computation. One of these steps ended with a record.",
        highlight=False,
    )
