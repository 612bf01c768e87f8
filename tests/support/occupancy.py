"""The occupancy model of all kernels.

`python -m tests.support.occupancy [80|90|100 ...]` prints the table of docs/occupancy.md. A model, no measurement;
cards.py says what it is made of.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .cards import CARDS, Block, Figures, figures
from .launches import ROWS, TOKENS, WIDTHS, build, cuda_figures, short_names
from .sass import inspect

ROOT = Path(__file__).resolve().parents[2]
OPS = {"cosine_alignment": 2, "gated_residual_norm": 2, "gelu": 1, "spatial_norm": 1, "swiglu": 1}
"""Op → dtypes in its case."""
TENSORS = {
    "cosine_alignment forward": 2,
    "cosine_alignment backward": 3,
    "gated_residual_norm forward": 4,
    "gated_residual_norm backward": 6,
    "gelu forward": 2,
    "gelu backward": 4,
    "spatial_norm forward": 2,
    "swiglu forward": 3,
    "swiglu backward": 6,
}
"""What each moves, in tensors of tokens; of a gated unit, in tensors of its results."""


class Row(NamedTuple):
    """One launch."""

    route: str  # cuda, triton
    op: str
    direction: str  # forward, backward
    capability: int
    dtype: str
    width: int
    groups: int
    figures: Figures

    @property
    def kernel(self) -> str:
        return f"{self.op} {self.direction}"


def triton_reports(cases: Sequence[list[Any]], folder: Path) -> list[dict[str, Any]]:
    """What compile_triton.py prints for the cases, two of them at a time."""

    def compile_half(half: int) -> list[dict[str, Any]]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(folder / str(half))
        command = [sys.executable, "-m", "tests.support.compile_triton", json.dumps(cases[half::2])]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(itertools.chain.from_iterable(pool.map(compile_half, (0, 1))))


def triton_case(op: str, capability: int, dtype: str, width: int) -> list[Any]:
    return [op, capability, *[dtype] * OPS[op], width]


def triton_rows(reports: Iterable[dict[str, Any]]) -> Iterable[Row]:
    for report in reports:
        op, capability, *dtypes, width = report["case"]
        if report["unknown"]:
            raise NotImplementedError(f"{report['case']}, {report['name']}: {report['unknown']}")
        for groups, (blocks, threads, *block) in report["blocks"].items():
            found = figures(
                CARDS[capability],
                report["registers"],
                report["shared"],
                threads,
                math.prod(blocks),
                ROWS,
                Block(*block),
            )
            direction = report["name"].removesuffix("_kernel")
            yield Row("triton", op, direction, capability, "/".join(dict.fromkeys(dtypes)), width, int(groups), found)


def cuda_rows(program: Path, kernels: Iterable[Any], op: str, capability: int, dtype: str, width: int) -> Iterable[Row]:
    """`kernels`: those of the extension for this capability."""
    kernels = list(kernels)
    by_name = dict(zip(short_names(kernel.name for kernel in kernels), kernels, strict=True))
    for groups in (1, ROWS // TOKENS) if op == "gated_residual_norm" else (ROWS // TOKENS,):
        for direction, found in cuda_figures(program, by_name, op, capability, dtype, width, groups).items():
            yield Row("cuda", op, direction, capability, dtype, width, groups, found)


def table(rows: Iterable[Row]) -> str:
    """Markdown; a launch that is the same in one group and in many is one line."""
    head = (
        "card", "route", "kernel", "dtype", "width", "groups", "blocks / warps", "lanes", "KiB in flight / needed",
        "instr / byte (limit)", "div64, div32 / MiB", "barriers / row", "waves", "idle", "bandwidth",
    )  # fmt: skip
    lines = [head, ("---",) * len(head)]
    unique: dict[Any, list[Row]] = {}
    for row in rows:
        unique.setdefault((row[:6], row.figures), []).append(row)
    for same in unique.values():
        row, f = same[-1], same[-1].figures
        lines.append((
            CARDS[row.capability].name, row.route, row.kernel, row.dtype, str(row.width),
            ", ".join(str(one.groups) for one in same), f"{f.blocks} / {f.warps}", f"{f.lanes:.0%}",
            f"{f.in_flight:.0f} / {f.needed:.0f}", f"{f.instructions:.1f} ({f.issue:.1f})",
            f"{f.divisions:.0f}, {f.short_divisions:.0f}", f"{f.barriers:.2f}", f"{f.waves:.2f}", f"{f.idle:.0%}",
            f"{f.bandwidth:.0%}",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(capabilities: Sequence[int]) -> None:
    extension = importlib.util.find_spec("layersync_kernels._cuda")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build(folder)
        chosen = [(op, cap, "bfloat16", width) for cap in capabilities for op in OPS for width in WIDTHS]
        rows: list[Row] = []
        if extension is None or extension.origin is None or program is None:
            print("no CUDA C++: the extension is built without it, or there is no g++", file=sys.stderr)
        else:
            for capability in capabilities:
                kernels = inspect(extension.origin, capability)
                for op, cap, dtype, width in chosen:
                    if cap == capability:
                        rows += cuda_rows(program, kernels, op, cap, dtype, width)
        rows += triton_rows(triton_reports([triton_case(*case) for case in chosen], folder))
    rows.sort(
        key=lambda row: (row.capability, list(OPS).index(row.op), row.direction == "backward", row.route, row.width)
    )
    print(table(rows))


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [90])
