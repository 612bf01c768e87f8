"""Rows as a terminal table and as lines of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .engine import Row

_COLUMNS = ("provider", "p20 ms", "p50 ms", "p80 ms", "GB/s", "% copy", "saved MB", "x eager", "x comp.")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def new_table(title: str, first: str, *numbers: str) -> Table:
    """A plain table: one column of names, the others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def print_table(rows: Sequence[Row], console: Console) -> None:
    """A table of the rows of one case and mode."""
    first = rows[0]
    table = new_table(f"{first.op}, {first.case}, {first.device}: {first.mode}", *_COLUMNS)
    for row in rows:
        if row.problem is not None:
            continue
        table.add_row(
            row.provider,
            _number(row.p20_ms, 3),
            _number(row.p50_ms, 3),
            _number(row.p80_ms, 3),
            _number(row.gb_per_s, 1),
            _number(None if row.copy_fraction is None else 100 * row.copy_fraction, 0),
            _number(None if row.saved_bytes is None else row.saved_bytes / 1e6, 3),
            _number(row.vs_eager, 2),
            _number(row.vs_compile, 2),
        )
    console.print(table)


def print_problems(rows: Iterable[Row], console: Console) -> None:
    """Which providers were not timed, and why."""
    for row in rows:
        if row.problem is not None:
            console.print(f"{row.case}: {row.provider} not timed: {row.problem}", highlight=False)


def append_json(rows: Iterable[Mapping[str, object]], path: Path) -> None:
    """Append one JSON line per row, at once: a run that is cut short keeps what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a line that was cut short spoils no other
                file.write(b"\n")
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def read_json(path: Path) -> list[dict[str, Any]]:
    """The rows of `append_json`; none where there is no file. What is no row is left out, as a line cut short."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
