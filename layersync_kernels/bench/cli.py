"""`layersync bench`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from .cases import MODES, PROVIDERS, Case, cases
from .engine import machine_facts, measure
from .report import append_json, print_problems, print_table


@dataclass
class BenchConfig:
    """Check, then time the fused ops against eager PyTorch and torch.compile, and the trainer with and without them."""

    what: tyro.conf.Positional[Literal["all", "ops", "trainer"]] = "all"
    """What to time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; auto: the GPU if there is one."""
    providers: tuple[Literal["eager", "compile", "cpp", "triton", "cuda"], ...] = PROVIDERS  # type: ignore[assignment]
    """Ways to compute the loss."""
    modes: tuple[Literal["forward", "backward", "both"], ...] = MODES  # type: ignore[assignment]
    """Passes to time."""
    size: tuple[int, int] | None = None
    """Rows and width of one case, in place of the suite."""
    rounds: int = 15
    """Measured rounds of every case and mode."""
    quick: bool = False
    """One small case: does the suite run at all?"""
    json: Path | None = None
    """Append the rows to this file, a line of JSON each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite.

    Returns:
        0; 1 when a provider computed something wrong, whose times are then not shown.
    """
    config = tyro.cli(BenchConfig, prog="layersync bench", args=argv)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in machine_facts(device).items()))
    wrong = False
    if config.what in ("all", "ops"):
        wrong = _ops(config, device, console)
    if config.what in ("all", "trainer"):
        from . import trainer

        rows = trainer.measure(device, quick=config.quick)
        trainer.print_table(rows, console)
        if config.json is not None:
            append_json(rows, config.json)
    return int(wrong)


def _ops(config: BenchConfig, device: str, console: Console) -> bool:
    suite = cases(device, quick=config.quick)
    if config.size is not None:
        suite = [Case(*config.size, dtype, device) for dtype in dict.fromkeys(case.dtype for case in suite)]
    wrong = False
    for case in suite:
        measured = measure(case, config.providers, modes=config.modes, rounds=3 if config.quick else config.rounds)
        for number, (_, group) in enumerate(itertools.groupby(measured, key=lambda row: row.mode)):
            rows = list(group)
            if number == 0:
                print_problems(rows, console)
            print_table(rows, console)
            wrong |= any(row.problem is not None and row.problem.startswith("wrong") for row in rows)
            if config.json is not None:
                append_json((row.as_dict() for row in rows), config.json)
    return wrong
