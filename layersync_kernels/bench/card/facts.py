"""Whose results these are, and what else is worth knowing of the machine: `python -m ... .facts [--out FILE]`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...runtime.machine import find_tool
from ..machine import machine_facts

_PASSING = ("date", "threads", "variables")  # what may differ between two calls that belong together
_QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"


def identity(device: str) -> dict[str, str]:
    """Card, versions and source, by which results are kept apart."""
    return {name: value for name, value in machine_facts(device).items() if name not in _PASSING}


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return (done.stdout or done.stderr).strip()


def describe(device: str) -> Iterator[str]:
    """Lines about the machine."""
    yield time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    yield from (f"{name}: {value}" for name, value in machine_facts(device).items())
    yield f"commit: {_output('git', 'rev-parse', 'HEAD')}"
    for tool in ("nvcc", "compute-sanitizer"):
        found = find_tool(tool)
        yield f"{tool}: {'not found' if found is None else _output(found, '--version').splitlines()[-1]}"
    if smi := shutil.which("nvidia-smi"):
        yield _output(smi, f"--query-gpu={_QUERY}", "--format=csv")
        yield _output(smi, "-q", "-d", "CLOCK,POWER")


def main(argv: Sequence[str]) -> int:
    """`--identity`: a line of JSON, or what is wrong with the card; else the description, into a file as well."""
    import torch

    if "--identity" in argv:
        if not torch.cuda.is_available():
            print(f"torch {torch.__version__} of {sys.executable} sees no NVIDIA card", file=sys.stderr)
            return 1
        print(json.dumps(identity("cuda")))
        return 0
    text = "\n".join(describe("cuda" if torch.cuda.is_available() else "cpu"))
    print(text)
    if "--out" in argv:
        Path(argv[argv.index("--out") + 1]).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
