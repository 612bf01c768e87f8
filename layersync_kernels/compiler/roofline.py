"""A prediction of time from counts: what a card's memory and its matrix units would need at their full rates."""

from __future__ import annotations

from typing import NamedTuple

from .cards import Card
from .gpu_graph import GROUPS, GpuStep, Kernel

ASSUMPTIONS = (
    "a prediction, not a measurement: no kernel of this was run or timed",
    "each kernel takes the longer of its bytes over the bandwidth and its flops over the matmul rate; kernels run one"
    " after the other",
    "matrix products and attention reach the full matmul rate, at every shape",
    "every byte is counted once per kernel and comes from memory: no reuse in the L2 cache between kernels",
    "no time for launches, the optimiser, EMA, data or communication; arithmetic outside of products is free",
)
"""What a prediction rests on; to be shown with it."""


class Prediction(NamedTuple):
    """Predicted times.

    Attributes:
        ms: all kernels, one after the other.
        memory_ms, matmul_ms: the kernels that memory, or the matrix units, hold up.
        group_ms: by group, see `gpu_graph.GROUPS`.
    """

    ms: float
    memory_ms: float
    matmul_ms: float
    group_ms: dict[str, float]

    @property
    def binds(self) -> str:
        """The resource that takes more of the time: "memory" or "matmul"."""
        return "memory" if self.memory_ms > self.matmul_ms else "matmul"


def predict(step: GpuStep, card: Card) -> Prediction:
    """Predict the time of a step, or of a difference of two, on a card.

    Raises:
        ValueError: products in a dtype whose rate is not known.
    """
    bound = {"memory": 0.0, "matmul": 0.0}
    groups = dict.fromkeys(GROUPS, 0.0)
    for kernel, count in step.kernels.items():
        memory, matmul = _times(kernel, card)
        time = count * max(memory, matmul)
        bound["memory" if memory >= matmul else "matmul"] += time
        groups[kernel.group] += time
    return Prediction(sum(bound.values()), bound["memory"], bound["matmul"], groups)


def _times(kernel: Kernel, card: Card) -> tuple[float, float]:
    """Milliseconds that a kernel needs of memory and of the matrix units."""
    memory = kernel.bytes / (1e9 * card.terabytes_per_s)
    if kernel.dtype is None:
        return memory, 0.0
    if kernel.dtype not in card.teraflops:
        raise ValueError(f"no matmul rate of {card.title} is known for {kernel.dtype}")
    return memory, kernel.flops / (1e9 * card.teraflops[kernel.dtype])
