"""Reads back what the compilers made of a GPU kernel: registers, spills and the widths of its memory accesses."""

import re
import subprocess
from collections import Counter
from typing import NamedTuple

from layersync_kernels.runtime.machine import find_tool


class Kernel(NamedTuple):
    """Facts about one function of a cubin."""

    name: str
    registers: int
    shared: int  # bytes of static shared memory, with what the system takes of it (1 KiB from sm_90 on)
    spills: int  # bytes of stack and local memory
    loads: Counter  # bits of an access to global memory → how many such instructions
    stores: Counter
    batch: int  # most loads of 128 bits that are issued with no arithmetic and no store between them
    sass: str  # as cuobjdump prints it


def _widths(sass, instruction):
    """Count accesses by width: LDG.E.128 has 128 bits, LDG.E.U16 16, LDG.E 32."""
    counts = Counter()
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", sass):
        sizes = [int(size) for size in re.findall(r"\.[US]?(8|16|64|128|256)\b", modifiers)]
        counts[sizes[0] if sizes else 32] += 1
    return counts


def _batch(sass):
    marks = {"LDG.E.128": "L", "FFMA": "f", "FMUL": "f", "STG": "S"}
    order = "".join(marks[name] for name in re.findall(r"\b(LDG\.E\.128|FFMA|FMUL|STG)\b", sass))
    return max(map(len, re.findall("L+", order)), default=0)


def inspect(binary, capability=None):
    """Every kernel of a cubin, or those that a shared library holds for the cards of `capability`."""
    selection = [] if capability is None else ["-arch", f"sm_{capability}"]
    command = [find_tool("cuobjdump"), "--dump-resource-usage", "--dump-sass", *selection, binary]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {
        name: (int(registers), int(shared), int(stack) + int(local))
        for name, registers, stack, shared, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump
        )
    }
    kernels = []
    for part in dump.split("Function : ")[1:]:
        name, sass = part.split(None, 1)
        registers, shared, spills = usage[name]
        spills += 4 * len(re.findall(r"\b(?:STL|LDL)\b", sass))
        accesses = _widths(sass, "LDG"), _widths(sass, "STG"), _batch(sass)
        kernels.append(Kernel(name, registers, shared, spills, *accesses, sass))
    return kernels
