"""Where and with what a figure was measured: rows of two machines, versions or sources are never mixed."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from ..runtime.machine import cpu_name, version_of

_PACKAGE = Path(__file__).resolve().parents[1]
_SOURCES = (("", "setup.py"), ("", "build_backend.py"), ("csrc", "*"), ("tests", "*"))  # beside the package's modules


@functools.cache
def source_digest() -> str:
    """A name for what is under test: the package's modules and, in a checkout, setup.py, csrc/ and tests/."""
    root = _PACKAGE.parent
    paths = set(_PACKAGE.rglob("*.py"))
    if (root / "setup.py").exists():
        paths |= {
            path for folder, names in _SOURCES for path in (root / folder).glob(f"**/{names}" if folder else names)
        }
    digest = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def machine_facts(device: str) -> dict[str, str]:
    """Device, versions, source and LAYERSYNC_* variables.

    Args:
        device: "cpu" or "cuda".
    """
    from .. import __version__

    facts = {
        "layersync_kernels": __version__,
        "source": source_digest(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if variables := [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("LAYERSYNC_")]:
        facts["variables"] = " ".join(variables)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "cuda": torch.version.cuda or "none"}
    return facts


def same_machine(facts: object, others: Mapping[str, str]) -> bool:
    """Whether two rows' facts are alike but for the date."""
    return isinstance(facts, Mapping) and {**facts, "date": ""} == {**others, "date": ""}


def free_bytes(device: str) -> int:
    """Memory that can be had on a device."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 << 30
