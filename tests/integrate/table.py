"""The table of the matrix in the documentation: written by a run, read by a test."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from .targets import Target
from .training import STEPS, Cell

PATH = Path(__file__).parents[2] / "docs" / "integrations" / "matrix.md"

HEAD = """# Where LayerSync was tried

Models of other libraries, at tiny sizes on the CPU, trained for {steps} optimiser steps with `LayerSync` and with the
eager formula added by hand. Written by `pytest tests/integrate/test_matrix.py --write-matrix
docs/integrations/matrix.md`, here with torch {torch}; a test sees to it that no row or column goes missing.

A number bounds the relative error of every loss and of every parameter's gradient, at every step: the largest error,
rounded up to a power of ten. Leaving the alignment out would be an error of more than {share}. In every cell no
activation outlives its step.

- compiled: without graph breaks (`fullgraph=True`), and nothing is compiled again after the first step. Cells with an
  asterisk go through Inductor, the others through Dynamo and AOTAutograd (`backend="aot_eager"`).
- checkpoint: not reentrant, by the library's own switch where it has one. selective: products are kept.
- accumulation: two batches a step. scaler: `GradScaler`. bf16: autocast, against autocast with the formula by hand;
  a first rounding to bf16 that falls the other way grows to some 2e-2, as it does when the hand-made gradient is off by
  1e-5.
- EMA: between forward pass and loss the model is copied, and the copy evaluated. reload: after half of the steps the
  whole model goes through `torch.save`, and what was loaded trains on.
- DDP and FSDP2 (each block, then the rest): two processes, against both batches in one.

"""


NO = "no: the model itself, without LayerSync, does not do it, as the run found:\n"


def bound(cell: Cell) -> str:
    return f"1e{math.ceil(math.log10(max(cell.error, 1e-7)))}"


def write(
    path: Path, targets: Sequence[Target], modes: Sequence[str], compiled: Sequence[str], cells: dict, share: float
) -> None:
    """Write the table; every cell must be there.

    Raises:
        KeyError: a cell that was not run.
    """
    rows, notes = [], []
    for target in targets:
        row = []
        for mode in modes:
            cell = cells[target.name, mode]
            if cell.refusal:
                notes.append(f"- {target.name}, {mode}: {cell.refusal}")
            star = r"\*" if target.inductor and mode in compiled else ""
            row.append("no" if cell.refusal else bound(cell) + star)
        rows.append([f"{target.name} ({target.versions})", *row])
    head = HEAD.format(steps=STEPS, torch=torch.__version__.partition("+")[0], share=share)
    lines = [["model", *modes], ["---"] * (len(modes) + 1), *rows]
    body = [f"| {' | '.join(line)} |" for line in lines]
    path.write_text(head + "\n".join(body + (["", NO, *notes] if notes else [])) + "\n")


def read(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The modes, and each target's cells."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return head[1:], {row[0].rpartition(" (")[0]: row[1:] for row in rows}
