"""`layersync bench`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from ..errors import UserError
from .cases import MODES, OPS, PROVIDERS, Case, cases
from .engine import DEVICE_LOST, DeviceLost, Row, is_wrong, measure
from .journal import Journal
from .machine import machine_facts
from .report import append_json, print_problems, print_table

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEVICES = ("auto", "cpu", "cuda")


@dataclass
class BenchConfig:
    """Check, then time the fused ops against eager PyTorch and torch.compile, and the trainer with and without them;
    count the bytes that a training step moves and keeps (traffic) and the most that the family's losses hold (memory);
    time a projector's last layer and its loss beside the matrix products in it (products). The last three are about the
    CPU, and traffic about a GPU too, which need not be there.

    "% copy" is what an ideal kernel would move, over the time, in percent of the speed of a copy in the same rounds: a
    yardstick and no limit. Inputs that the cache still holds, and stores that go past it, make more than 100.
    """

    what: tyro.conf.Positional[Literal["all", "ops", "trainer", "traffic", "memory", "products"]] = "all"
    """all: ops, trainer and traffic. Traffic and memory are counted, with the same result on every machine."""
    device: str = "auto"
    """Where: cpu, cuda, or auto, the GPU if there is one. For traffic also a card by name (h100, a100, h200, b200):
    then a step is counted on the graphs that torch.compile and we would run there, and its time predicted, without a
    GPU."""
    ops: tuple[str, ...] = tuple(OPS)
    """Ops to time."""
    providers: tuple[Literal["eager", "compile", "inductor", "unfused", "cpp", "triton", "cuda"], ...] = PROVIDERS  # type: ignore[assignment]
    """Ways to compute them."""
    modes: tuple[Literal["forward", "backward", "both"], ...] = MODES  # type: ignore[assignment]
    """Passes to time."""
    dtypes: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16", "fp16")
    """Of the ops' inputs, as far as the suite of the device has them."""
    size: tuple[int, int] | None = None
    """Rows and width, in place of the sizes of the suite."""
    rounds: int = 15
    """Measured rounds of every case and mode."""
    breakdown: bool = False
    """Of the trainer: a table of where the time of its steps goes, in place of the contest; --rounds are steps. Under
    torchrun all processes train, and the first one says where its time went."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """How the processes of --breakdown share the model."""
    model: str | None = None
    """Whose traffic is counted, or whose step is broken down, on latents (4, 32, 32); by default SiT-S/2, and SiT-XL/2
    where a GPU runs the step."""
    batch: int | None = None
    """Images in that step, of all processes; by default 8 for each, 64 for each where a GPU runs the step, and 256 on a
    card by name."""
    precision: tuple[Literal["fp32", "bf16"], ...] | None = None
    """Of that step; bf16 is autocast. By default both, bf16 on a card by name, and the trainer's own of --breakdown."""
    backend: Literal["cuda", "triton"] = "cuda"
    """Of our ops on a card by name: the CUDA extension, or Triton."""
    bandwidth: float | None = None
    """TB/s of a card by name, in place of the one that is known of it."""
    matmul: float | None = None
    """TFLOP/s of a card by name in matrix products, in place of those that are known of it."""
    keep_memory: bool = True
    """On a CPU, keep freed memory in the process, as the trainer does; else every call faults its outputs in."""
    quick: bool = False
    """One small case each: does the suite run at all?"""
    json: Path | None = None
    """Append the rows to this file, a line of JSON each, as they come."""
    resume: bool = False
    """Leave out what --json holds already from this device, these versions and this source (ops and trainer)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite.

    Returns:
        0; 1 when a provider computed something wrong, whose times are then not shown; 75 when one has left the GPU
        unusable: --resume goes on with the others, in a new process.
    """
    config = tyro.cli(BenchConfig, prog="layersync bench", args=argv)
    console = Console()
    if config.breakdown:
        _breakdown(config, console)
        return 0
    if config.device not in _DEVICES:
        _gpu_traffic(config, console)
        return 0
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    _say_machine(device, console)
    wrong = False
    if config.resume and config.json is None:
        raise UserError("--resume: name the file that holds the rows by --json")
    try:
        if config.what in ("all", "ops"):
            wrong = _ops(config, device, console)
        if config.what in ("all", "trainer"):
            _trainer(config, device, console)
    except DeviceLost as error:
        console.print(f"{error}; --resume goes on with the others, in a new process", highlight=False)
        return DEVICE_LOST
    if config.what in ("all", "traffic"):
        _traffic(config, console)
    if config.what == "memory":
        from . import memory

        _table(memory.measure(quick=config.quick), memory.print_table, config, console)
    if config.what == "products":
        from . import products

        _table(products.measure(quick=config.quick), products.print_table, config, console)
    return int(wrong)


def _say_machine(device: str, console: Console) -> None:
    console.print(", ".join(f"{name} {value}" for name, value in machine_facts(device).items()))


def _table(
    measured: Iterable[dict[str, object]],
    print_rows: Callable[[Sequence[dict[str, object]], Console], None],
    config: BenchConfig,
    console: Console,
) -> None:
    rows = list(measured)
    for row in rows:
        if row["problem"] is not None:
            console.print(f"{row['case']}: {row['provider']} not measured: {row['problem']}", highlight=False)
    print_rows(rows, console)
    if config.json is not None:
        append_json(rows, config.json)


def _checked_traffic(config: BenchConfig, batch: int) -> tuple[str, int]:
    """The model and the batch whose traffic is counted."""
    from . import traffic

    batch = batch if config.batch is None else config.batch
    model = "SiT-S/2" if config.model is None else config.model
    if model not in traffic.sit_models:
        raise UserError(f"--model {model}: expected one of {', '.join(traffic.sit_models)}")
    if batch < 1:
        raise UserError(f"--batch {batch}: expected at least 1")
    return model, batch


def _gpu_traffic(config: BenchConfig, console: Console) -> None:
    from ..compiler.cards import CARDS
    from . import gpu_tables, gpu_traffic

    if config.device.lower() not in CARDS:
        raise UserError(f"--device {config.device}: expected one of {', '.join((*_DEVICES, *CARDS))}")
    if config.what != "traffic":
        raise UserError(
            f"--device {config.device}: nothing runs on a card by name, only `traffic` can be counted for it"
        )
    model, batch = _checked_traffic(config, 256)
    try:
        card = CARDS[config.device.lower()].with_rates(config.bandwidth, config.matmul)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    for precision in config.precision or ("bf16",):
        setting = gpu_traffic.Setting(model, batch, precision, card, config.backend)
        rows = gpu_traffic.measure(setting, quick=config.quick, jobs=min(2, os.cpu_count() or 1))
        gpu_tables.print_tables(rows, console)
        if config.json is not None:
            append_json(rows, config.json)


def _traffic(config: BenchConfig, console: Console) -> None:
    from . import traffic

    model, batch = _checked_traffic(config, 8)
    if config.quick:
        model, batch = "SiT-P/8", 2
    for precision in config.precision or ("fp32", "bf16"):
        rows = traffic.measure(model, batch, precision)
        traffic.print_tables(rows, console)
        if config.json is not None:
            append_json(rows, config.json)


def _trainer(config: BenchConfig, device: str, console: Console) -> None:
    from . import throughput as trainer

    journal = _journal(config, device)
    earlier = [] if journal is None else journal.rows
    if any(row.get("op") == "trainer" for row in earlier):
        console.print("trainer: measured already", highlight=False)
        return
    rows = []
    for row in trainer.measure(device, quick=config.quick, earlier=earlier):
        rows.append(row)
        if config.json is not None:
            append_json([row], config.json)
    trainer.print_table(rows, console)


def _breakdown(config: BenchConfig, console: Console) -> None:
    from ..sit.config.parallel import ParallelConfig
    from ..sit.distributed.processes import joined
    from . import breakdown
    from .throughput import QUICK

    if config.what != "trainer":
        raise UserError(f"--breakdown is of the trainer: layersync bench trainer --breakdown, not {config.what}")
    if config.resume:
        raise UserError(
            "--resume goes on with the contest of the trainer and with ops; --breakdown is measured at once"
        )
    with joined(config.device, timeout=ParallelConfig().timeout) as (processes, device):
        model, batch = config.model, config.batch
        if config.quick:
            model, batch = QUICK[0], QUICK[1] * processes.world
        console.quiet = not processes.first
        _say_machine(device.type, console)
        for precision in config.precision or ("auto",):
            rows = breakdown.measure(
                device, processes, model=model, batch=batch, parallel=config.parallel, precision=precision,
                steps=config.rounds,
            )  # fmt: skip
            breakdown.print_table(rows, console)
            if config.json is not None and processes.first:
                append_json(rows, config.json)


def _journal(config: BenchConfig, device: str) -> Journal | None:
    return Journal(config.json, machine_facts(device)) if config.resume and config.json is not None else None


def _ops(config: BenchConfig, device: str, console: Console) -> bool:
    if unknown := set(config.ops) - set(OPS):
        raise UserError(f"--ops {' '.join(sorted(unknown))}: expected some of {', '.join(OPS)}")
    dtypes = {_DTYPES[name] for name in config.dtypes}
    suite = [case for case in cases(device, ops=config.ops, quick=config.quick) if case.dtype in dtypes]
    if config.size is not None:
        count, width = config.size
        suite = list(dict.fromkeys(dataclasses.replace(case, rows=count, width=width) for case in suite))
    journal = _journal(config, device)
    wrong = journal is not None and any(
        is_wrong(row.get("problem")) for row in journal.rows if row.get("op") in config.ops
    )
    told: set[tuple[str | None, ...]] = set()
    for case in suite:
        modes: list[str] = list(config.modes)
        if journal is not None:
            modes = journal.modes_left(case, config.providers, modes)
            if died := journal.bury(case, config.providers, modes):
                print_problems(died[: len(config.providers)], console)
                continue
        if modes:
            with journal.measuring(case) if journal is not None else contextlib.nullcontext():
                wrong |= _case(config, case, modes, console, told)
    return wrong


def _case(
    config: BenchConfig, case: Case, modes: Sequence[str], console: Console, told: set[tuple[str | None, ...]]
) -> bool:
    rounds = 3 if config.quick else config.rounds
    measured = measure(case, config.providers, modes=modes, rounds=rounds, keep_memory=config.keep_memory)
    lost: DeviceLost | None = None

    def until_lost() -> Iterator[Row]:  # the rows of a mode are printed together, also when an error follows them
        nonlocal lost
        try:
            yield from measured
        except DeviceLost as error:
            lost = error

    wrong = False
    for _, group in itertools.groupby(until_lost(), key=lambda row: row.mode):
        rows = list(group)
        if config.json is not None:
            append_json((row.as_dict() for row in rows), config.json)
        problems: dict[tuple[str | None, ...], Row] = {}
        for row in rows:
            if row.problem is not None:  # what no case here can do is told once, what is wrong of each case
                of = (row.op, row.case) if is_wrong(row.problem) else ()
                problems[(row.provider, row.problem, *of)] = row
        print_problems((row for key, row in problems.items() if key not in told), console)
        told.update(problems)
        print_table(rows, console)
        wrong |= any(is_wrong(row.problem) for row in rows)
    if lost is not None:
        raise lost
    return wrong
