"""Registers and spills of GPU kernels, read from their machine code: Inductor's, and those of our extension."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from ..ops import native
from ..runtime.machine import find_tool
from .cards import Card
from .pretended_card import machine_code, triton_sources


class Resources(NamedTuple):
    """What a kernel takes of a multiprocessor.

    Attributes:
        name: without the number of Inductor's, or the variant of ours.
        variants: configurations that Inductor would try, or instances of ours; it is not known which one runs.
        registers: of a thread, least and most over the variants.
        spilled: bytes of a thread's stack and local memory, most over the variants.
    """

    name: str
    variants: int
    registers: tuple[int, int]
    spilled: int


def obstacle() -> str | None:
    """Why machine code cannot be read here, or None."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 has Triton interpret kernels, not compile them"
    if find_tool("cuobjdump") is None:
        return "there is no cuobjdump, which CUDA's toolkit and Triton's wheel bring"
    return None


def usage(binary: Path, card: Card | None = None) -> dict[str, tuple[int, int]]:
    """Kernel → (registers, bytes spilled) of a cubin, or of what a shared library holds for a card."""
    tool = find_tool("cuobjdump")
    assert tool is not None
    selection = [] if card is None else ["-arch", "sm_{}{}".format(*card.capability)]
    command = [tool, "--dump-resource-usage", *selection, str(binary)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    return {name: (int(registers), int(stack) + int(local)) for name, registers, stack, local in found}


def inductor_resources(code: Iterable[str], names: Iterable[str], card: Card) -> list[Resources]:
    """Compile some of the kernels that Inductor wrote, and read what they take.

    Args:
        code: as `GpuStep.code` has it.
        names: of kernels, without their numbers.
        card: whose machine code.
    """
    wanted = set(names)
    found: dict[str, list[tuple[int, int]]] = {}
    for text in code:
        for name, source in triton_sources(text).items():
            short = re.sub(r"_\d+$", "", name)
            if short in wanted:
                found.setdefault(short, []).extend(_usage_of(name, source, card))
    return [_resources(name, usages) for name, usages in found.items()]


def _usage_of(name: str, source: str, card: Card) -> list[tuple[int, int]]:
    usages: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        for cubin in machine_code(name, source, card):
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(cubin)
            usages += usage(path).values()
    return usages


# Instances by dtypes, as their names are mangled: a stream of fp32 beside halves, halves alone, fp32 alone; but not
# those for unaligned rows.
_INSTANCES = {
    torch.bfloat16: r"_kernelIf?13__nv_bfloat16L(?!i1E)",
    torch.float16: r"_kernelIf?6__halfL(?!i1E)",
    torch.float32: r"_kernelIff?L(?!i1E)",
}


def our_resources(names: Iterable[str], dtype: torch.dtype, card: Card) -> tuple[list[Resources], str | None]:
    """What the kernels of our extension take, all instances of an op for a dtype and aligned rows together.

    Args:
        names: of raw ops, e.g. "layersync_cuda::gelu_forward".
        dtype: of what stands between matrix products; the residual stream is fp32.
        card: whose machine code.

    Returns:
        the list, and why it is empty where it is.
    """
    spec = importlib.util.find_spec("layersync_kernels._cuda")
    if spec is None or spec.origin is None:
        return [], f"our extension holds no kernels for GPUs: {native.cuda().reason}"
    kernels = usage(Path(spec.origin), card)
    if not kernels:
        return [], f"our extension was not built for {card.title}"
    found = []
    for name in sorted(names):
        words = name.rpartition("::")[2].split("_")  # gated_residual_norm_forward: gated_forward_kernel
        pattern = f"{words[0]}_{words[-1]}{_INSTANCES[dtype]}"
        usages = [used for kernel, used in kernels.items() if re.search(pattern, kernel)]
        if usages:
            found.append(_resources(name, usages))
    return found, None


def _resources(name: str, usages: list[tuple[int, int]]) -> Resources:
    registers = [used for used, _ in usages]
    return Resources(name, len(usages), (min(registers), max(registers)), max(spilled for _, spilled in usages))
