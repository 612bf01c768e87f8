"""The launches of the CUDA C++ kernels, from the host functions of csrc (launches.cpp), run by sass_run.py."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from .cards import CARDS, LATENCY, Block, Figures, figures
from .sass import Kernel
from .sass_run import Machine, parse

ROWS, TOKENS = 65536, 256  # of a batch of 256 samples
WIDTHS = (64, 72, 384, 768, 1152, 1536, 3072, 5120)
STREAMED = 100  # tensors with a lower number stream by; the others are small and stay in the caches
DTYPES = {"float32": 0, "bfloat16": 1}


class Launch(NamedTuple):
    """Of one kernel; `longer` has the parameters of runs that are one step longer, `steps` how many steps are left."""

    kernel: str  # demangled, without namespaces and arguments
    blocks: tuple[int, ...]
    threads: int
    tiles: int  # blocks that share rows, where the last has fewer columns than the others; else 1
    parameters: bytes
    longer: bytes = b""
    steps: int = 0


def streams(tensor: int) -> bool:
    return tensor < STREAMED


def build(folder: Path) -> Path | None:
    """Compile launches.cpp; None where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    source, program = Path(__file__).with_suffix(".cpp"), folder / "launches"
    flags = [
        "-std=c++20",
        "-O0",
        "-fno-strict-aliasing",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-unused-function",
        "-rdynamic",
    ]
    subprocess.run([compiler, *flags, source, "-o", program, "-ldl"], check=True)
    return program


def short_names(names: Iterable[str]) -> list[str]:
    """Demangled, without namespaces and arguments."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    text = re.sub(r"layersync::|^void |\(.*\)$", "", done.stdout, flags=re.MULTILINE)
    return text.replace("__nv_bfloat16", "bf16").replace("__half", "fp16").splitlines()


def launches(program: Path, op: str, dtype: str, width: int, groups: int) -> list[Launch]:
    """What the host functions launch for ROWS rows."""
    command = [program, op, *map(str, (DTYPES[dtype], ROWS, width, groups))]
    rows = [
        line.split("\t")
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    found = []
    for kernel, (_, blocks, threads, tiles, parameters, *rest) in zip(
        short_names(row[0] for row in rows), rows, strict=True
    ):
        longer = (bytes.fromhex(rest[0]), int(rest[1])) if rest else ()
        found.append(Launch(kernel, (int(blocks),), int(threads), int(tiles), bytes.fromhex(parameters), *longer))
    return found


def run(code, capability: int, launch: Launch) -> Block:
    """What a block of a launch does; where blocks differ, what they do on average."""
    latency = round(LATENCY * CARDS[capability].clock)

    def block(place, parameters):
        grid = (*launch.blocks, 1, 1)[:3]
        return Block.of(
            Machine(code, capability, launch.threads, parameters, grid, place, latency, streams).run(), streams
        )

    def whole(place):
        short = block(place, launch.parameters)
        return short.repeated(block(place, launch.longer), launch.steps) if launch.steps else short

    first = whole((0, 0, 0))
    return first.repeated(whole((launch.tiles - 1, 0, 0)), 1 / launch.tiles) if launch.tiles > 1 else first


def cuda_figures(
    program: Path, kernels: Mapping[str, Kernel], op: str, capability: int, dtype: str, width: int, groups: int
) -> dict[str, Figures]:
    """Forward and backward → figures; `kernels` maps short names to those of the extension."""
    found = {}
    for name, launch in zip(("forward", "backward"), launches(program, op, dtype, width, groups), strict=False):
        kernel = kernels[launch.kernel]
        block = run(parse(kernel.sass), capability, launch)
        found[name] = figures(
            CARDS[capability], kernel.registers, kernel.shared, launch.threads, math.prod(launch.blocks), ROWS, block
        )
    return found
