"""Exact counts of a training step; see `compiler.analysis`, for GPUs `compiler.gpu_graph` and what goes with it."""

from .compiler.analysis import KINDS, Moved, Op, StepCount, block_count, count_step, ideal_block
from .compiler.cards import CARDS, Card, find_card
from .compiler.cuda_graphs import cuda_graph_obstacles
from .compiler.gpu_graph import GROUPS, GpuStep, Kernel, compose_step, count_gpu_step
from .compiler.roofline import ASSUMPTIONS, Prediction, predict

__all__ = [
    "ASSUMPTIONS",
    "CARDS",
    "GROUPS",
    "KINDS",
    "Card",
    "GpuStep",
    "Kernel",
    "Moved",
    "Op",
    "Prediction",
    "StepCount",
    "block_count",
    "compose_step",
    "count_gpu_step",
    "count_step",
    "cuda_graph_obstacles",
    "find_card",
    "ideal_block",
    "predict",
]
