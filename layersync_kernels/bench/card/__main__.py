"""`python -m layersync_kernels.bench.card`: what benchmarks/gpu.sh calls."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from ...errors import UserError
from ...runtime.machine import find_tool
from ..report import new_table
from .budget import BUDGET, load_figures
from .build import ROOT
from .facts import identity
from .runner import FAILED, Runner, Stage
from .stages import COMMON, WORK, Plan, plans

_CARD_CORES = 16  # of a machine with an H100, as they are rented
_DRY_SECONDS = 300.0  # for each stage of a dry run, on a machine that may have other work


@dataclass
class CardConfig:
    """Build, test, check with compute-sanitizer and time everything on a machine with an NVIDIA card, what matters most
    first. A call that was cut short, or whose time was up, is followed by another, which goes on where it ended.

    Exit code 0: all passed, or is missing here. 1: a stage failed. 2: it cannot begin. 3: call again to go on.
    """

    out: Path | None = None
    """Where results go, and where an earlier call's are; by default $OUT, else benchmarks/results/ and the card's name.
    Only this folder need be kept between calls."""
    dry_run: bool = False
    """Check every stage on a machine without a card: run what a CPU can run, print the rest and the computed budget."""
    fresh: bool = False
    """Begin anew; what is in the folder is put aside there."""
    retry: bool = False
    """Repeat the stages, and the tests in them, that have failed."""
    seconds: float = BUDGET
    """Of all stages of this call together."""
    budget: bool = False
    """Print the computed budget, and end."""
    measure_compile: bool = False
    """Count and time what the stages compile, for benchmarks/card.json, and end. Needs a CUDA toolkit, and no card."""


def card_identity() -> dict[str, str]:
    """Of the card at hand, asked for in a process of its own, which gives the memory back that CUDA takes.

    Raises:
        UserError: torch sees no card.
    """
    command = [sys.executable, "-m", "layersync_kernels.bench.card.facts", "--identity"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(f"{said}; name another Python by PYTHON=..., or check the stages by --dry-run")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def print_budget(made: Sequence[Plan], stages: Sequence[Stage], console: Console) -> float:
    """A table of what each stage is expected to take; returns the sum, of all but the extra ones."""
    table = new_table("computed seconds on a card, predicted from what is compiled", "stage", "estimate", "limit")
    total = 0.0
    for plan, stage in zip(made, stages, strict=True):
        total += 0 if plan.extra else stage.estimate
        name = f"{stage.name}, in what is left of the time" if plan.extra else stage.name
        table.add_row(name, f"{stage.estimate:.0f}", f"{stage.limit:.0f}")
    table.add_row("all", f"{total:.0f}", f"{BUDGET:.0f}")
    console.print(table)
    return total


def _dry_run(made: Sequence[Plan], stages: Sequence[Stage], out: Path, fresh: bool, console: Console) -> int:
    for tool in ("nvcc", "compute-sanitizer", "nvidia-smi"):
        if find_tool(tool) is None:
            console.print(f"no {tool} here; a run with a card needs it", highlight=False)
    console.print("\nwith a card:", highlight=False)
    for plan, stage in zip(made, stages, strict=True):
        variables = "".join(f"{name}={value} " for name, value in plan.environment.items())
        said = f"missing here: {stage.missing}; " if stage.missing else ""
        console.print(f"  {stage.name}: {said}{variables}{' '.join(stage.command)}", highlight=False, soft_wrap=True)
    total = print_budget(made, stages, console)
    here = []
    for plan, stage in zip(made, stages, strict=True):
        if plan.dry is not None:
            command = [sys.executable, "-m", *plan.dry]
            here.append(
                Stage(f"{plan.name}, dry", command, _DRY_SECONDS, environment=COMMON, resumable=stage.resumable)
            )
    runner = Runner(out, seconds=_DRY_SECONDS * len(here))
    code = runner.run(here, identity("cpu") | {"gpu": "none, a dry run"}, fresh=fresh)
    if total > BUDGET:
        console.print(f"the stages take {total:.0f} s, more than {BUDGET:.0f}: leave something out", highlight=False)
        return FAILED
    return code


def _folder(config: CardConfig, card: str) -> Path:
    named = config.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    folder = named or ROOT / "benchmarks" / "results" / re.sub(r"[^A-Za-z0-9]+", "-", card)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; expected a folder")
    return folder.resolve()


def run(config: CardConfig, console: Console) -> int:
    """What the command does."""
    if not (ROOT / "tests").is_dir() or not (ROOT / "csrc").is_dir():
        raise UserError(f"{ROOT} is no checkout of this repository; the stages need its tests/ and csrc/")
    if config.seconds <= 0:
        raise UserError(f"--seconds {config.seconds:g}: expected more than 0")
    if config.measure_compile:
        from .measure import write

        write()
        return 0
    figures: dict[str, Any] = load_figures()
    if config.dry_run or config.budget:
        out = _folder(config, "dry-run") if config.out or os.environ.get("OUT") else WORK / "dry-run"
        made = plans(out, figures)
        stages = [plan.stage(figures, _CARD_CORES) for plan in made]
        if config.budget:
            return FAILED if print_budget(made, stages, console) > BUDGET else 0
        return _dry_run(made, stages, out, config.fresh, console)
    card = card_identity()
    out = _folder(config, card["gpu"])
    made = plans(out, figures, retry=config.retry)
    stages = [plan.stage(figures, os.cpu_count() or 1) for plan in made]
    print_budget(made, stages, console)
    return Runner(out, config.seconds).run(stages, card, fresh=config.fresh, retry=config.retry)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    config = tyro.cli(CardConfig, prog="benchmarks/gpu.sh", args=argv)
    try:
        return run(config, Console(soft_wrap=False))
    except UserError as error:
        print(f"gpu.sh: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
