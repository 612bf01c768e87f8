"""`layersync tune`: leaves the table that backend="auto" follows."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from ..errors import UserError
from ..ops import dispatch, registry, tuning
from ..runtime import environment
from ..runtime.memory import keep_freed_memory
from ..sit.device import resolve_device
from ..sit.files import write_json
from .candidates import Entry, candidates_of, decide, function_of, measure, suite
from .cases import Case
from .engine import is_wrong
from .report import new_table

# Of a case, nearly all of it for torch.compile.
_SECONDS = {"cpu": 8, "cuda": 8}
_SECONDS_FROM = {
    "cpu": "seen on an AMD EPYC; longer where other work shares the cores",
    "cuda": "a prediction, which no GPU has confirmed",
}


@dataclass
class TuneConfig:
    """Measure the backends of every op against each other on this machine, each checked against fp64 first, and write
    the table that backend="auto" follows from then on: see docs/tuning.md. LAYERSYNC_TUNING=off leaves it aside.
    """

    quick: bool = False
    """One size of each op and fewer rounds. The table then says nothing of the other widths."""
    out: Path | None = None
    """Write the table here, for LAYERSYNC_TUNING to name; default: the user's cache folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; auto: the GPU if there is one."""


class Plan(NamedTuple):
    """What is to be measured.

    Attributes:
        groups: (public function, dtype, class of widths) → cases with the candidates of each.
        alone: a line for each op of which there is nothing to compare.
    """

    groups: dict[tuple[str, str, str], list[tuple[Case, dict[str, str | None]]]]
    alone: list[str]

    @property
    def cases(self) -> int:
        """How many there are."""
        return sum(map(len, self.groups.values()))


def plan(device: str, quick: bool) -> Plan:
    """Find out what can be compared on a type of device."""
    found = Plan({}, [])
    for case in suite(device, quick):
        function, candidates = function_of(case), candidates_of(case)
        possible = [name for name, why in candidates.items() if why is None]
        if len(possible) > 1:
            key = (function, case.dtype_name, tuning.width_class(case.width))
            found.groups.setdefault(key, []).append((case, candidates))
            continue
        reasons = "".join(f"; {name}: {why}" for name, why in candidates.items() if why is not None)
        line = f"{function} has {', '.join(possible) or registry.find(function).otherwise} alone here{reasons}"
        if line not in found.alone:
            found.alone.append(line)
    return found


def tune(device: str, planned: Plan, *, quick: bool, console: Console) -> list[Entry]:
    """Measure what is planned.

    Args:
        device: "cpu" or "cuda".
        planned: by `plan`.
        quick: fewer rounds, in less time.
        console: for the progress.
    """
    if device == "cpu":
        keep_freed_memory()
    entries: list[Entry] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=planned.cases)
        for (function, dtype, width_class), cases in planned.groups.items():
            ruled = dispatch.rule(function, device, cases[0][0].dtype).backend
            entry = Entry(function, dtype, width_class, ruled, [])
            for case, candidates in cases:
                progress.update(task, description=f"{function} {case.name}")
                entry.shapes.append(measure(case, candidates, rounds=7 if quick else 15, seconds=4 if quick else 10))
                progress.advance(task)
            decide(entry)
            entries.append(entry)
            progress.console.print(f"{function} {dtype}, {width_class} channels: {_outcome(entry)}", highlight=False)
    return entries


def _outcome(entry: Entry) -> str:
    if entry.choice is None:
        return "nothing works"
    return entry.choice if entry.choice == entry.base else f"{entry.choice}, {entry.margin:.2f} times {entry.base}"


def table_of(entries: Iterable[Entry], device: str, quick: bool) -> dict[str, Any]:
    """What `ops.tuning` reads, and what it leaves aside: threads, single shapes and problems."""
    return {
        "format": tuning.FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": tuning.identity(device),
        "threads": torch.get_num_threads(),
        "quick": quick,
        "entries": [entry.as_dict() for entry in entries if entry.choice is not None],
    }


def print_entries(entries: Sequence[Entry], console: Console) -> None:
    """A table of all candidates and the choices, then the problems."""
    columns = ("rows", "width", "candidate", "ms", "x base", "spread", "keeps MB", "choice")
    table = new_table('candidates, forward and backward; what "auto" takes from now on', "op", *columns)
    problems: dict[str, None] = {}
    for entry in entries:
        for shape in entry.shapes:
            for name, result in shape.candidates.items():
                if result.ratio is None or result.p50_ms is None or result.spread is None:
                    problems[f"{entry.op} {shape.rows}x{shape.width} {entry.dtype}: {name}: {result.problem}"] = None
                    continue
                chosen = ("kept" if name == entry.rule else "new") if name == entry.choice else ""
                table.add_row(
                    f"{entry.op} {entry.dtype}", str(shape.rows), str(shape.width), name, f"{result.p50_ms:.3f}",
                    f"{result.ratio:.2f}", f"{result.spread:.2f}", f"{(result.saved_bytes or 0) / 1e6:.2f}", chosen,
                )  # fmt: skip
    console.print(table)
    for problem in problems:
        console.print(escape(problem), highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Returns:
        0; 1 when a candidate computed something wrong.
    """
    config = tyro.cli(TuneConfig, prog="layersync tune", args=argv)
    console = Console()
    if config.device == "cuda" and not torch.cuda.is_available():
        built = "is a build without CUDA" if torch.version.cuda is None else "sees no GPU"
        raise UserError(f"--device cuda: torch {torch.__version__} {built}; --device cpu tunes the CPU")
    device = resolve_device(config.device).type
    path = config.out or tuning.default_path(device)
    facts = ", ".join(f"{name} {value}" for name, value in tuning.identity(device).items())
    console.print(escape(f"{facts}, {torch.get_num_threads()} CPU threads"), highlight=False)
    planned = plan(device, config.quick)
    for line in planned.alone:
        console.print(escape(line), highlight=False)
    console.print(
        f"{planned.cases} cases, compiled and measured in about {_duration(planned.cases * _SECONDS[device])} "
        f"({_SECONDS_FROM[device]})",
        highlight=False,
    )
    entries = tune(device, planned, quick=config.quick, console=console)
    if entries:
        print_entries(entries, console)
    if not any(entry.choice for entry in entries):
        console.print("nothing was written: no op has two candidates that work here")
        return int(_wrong(entries))
    try:
        write_json(path, table_of(entries, device, config.quick))
    except OSError as error:
        raise UserError(f"the table cannot be written: {error}; --out FILE writes it elsewhere") from None
    dispatch.reset()
    console.print(escape(f"written: {path}"), highlight=False, soft_wrap=True)
    for variable, follows in ((environment.BACKEND, "auto"), (environment.TUNING, "auto")):
        if config.out is None and variable.get() != follows:
            console.print(f"{variable.name}={variable.get()} goes before it: nothing reads this table", markup=False)
    if config.out is not None:
        console.print(escape(f"{environment.TUNING.name}={path} has it read"), highlight=False, soft_wrap=True)
    return int(_wrong(entries))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _wrong(entries: Iterable[Entry]) -> bool:
    results = (result for entry in entries for shape in entry.shapes for result in shape.candidates.values())
    return any(is_wrong(result.problem) for result in results)
