"""Exact counts of a training step; see `compiler.analysis`."""

from .compiler.analysis import KINDS, Moved, Op, StepCount, block_count, count_step, ideal_block

__all__ = ["KINDS", "Moved", "Op", "StepCount", "block_count", "count_step", "ideal_block"]
