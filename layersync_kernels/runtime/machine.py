"""What the figures of a machine depend on: its processor, its GPU, versions; and the tools of CUDA that it has."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """The name of the processor, or of the current GPU ("none" where torch sees none)."""
    if device == "cpu":
        return cpu_name()
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def version_of(package: str, missing: str = "none") -> str:
    """The version of an installed package, or `missing`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return missing


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: the toolkit's, or what Triton's wheel brings of it, or that on PATH; or None."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        homes.append(str(Path(triton.origin).parent / "backends" / "nvidia"))
    tools = (Path(home) / "bin" / name for home in homes if home)
    return next((str(tool) for tool in tools if tool.exists()), shutil.which(name))
