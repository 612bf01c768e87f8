"""The phases of a training step, by the names under which PyTorch's profiler finds them."""

from __future__ import annotations

import contextlib
from typing import Literal, get_args

import torch
from torch.profiler import record_function

Phase = Literal["data", "forward", "backward", "optimizer", "ema", "log"]
"""data: waiting for a batch, mirroring. forward: with losses, targets and teachers. optimizer: with clipping. log:
means of what is reported, and the look whether it is finite."""

PHASES: tuple[Phase, ...] = get_args(Phase)

_PREFIX = "step:"
_NOT_MEASURED = contextlib.nullcontext()


def phase(name: Phase) -> contextlib.AbstractContextManager[object]:
    """A range of the profiler around a phase; where none runs, nothing: the range alone would take 12 µs."""
    return record_function(_PREFIX + name) if torch.autograd._profiler_enabled() else _NOT_MEASURED


def phase_of(range_name: str) -> Phase | None:
    """Which phase a range of the profiler is, if it is one."""
    return next((name for name in PHASES if range_name == _PREFIX + name), None)
