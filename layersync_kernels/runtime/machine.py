"""What the figures of a machine depend on: its processor, its GPU, versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

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


def version_of(package: str) -> str:
    """The version of an installed package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
