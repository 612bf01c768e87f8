"""When communication runs, and how much of it the passes hide.

The links work in the order in which they are asked, one request at a time, and each collective at the rate that it has
alone. A block's gradient exists when the backward pass has left the block; no byte of it moves before.

- ddp: gradients fill buckets from the last parameter to the first. A bucket is summed once its last gradient is there,
  as DistributedDataParallel does (Li et al. 2020, arXiv:2006.15704); the last one when the backward pass is over.
- fsdp: a unit is gathered before each pass, while the one before it computes; the first of each pass waits. Behind its
  backward pass its gradients are scattered (Zhao et al. 2023, arXiv:2304.11277).
- hsdp: so inside of a node; what was scattered is summed between nodes, over links of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .collectives import Cost
from .inputs import Inputs

_MIB = 1 << 20
_FP32 = 4


class Timeline(NamedTuple):
    """A forward and a backward pass.

    Attributes:
        compute_ms: of both.
        communication: of all collectives, as if one followed the other.
        end_ms: when all is done, if as much hides as can.
    """

    compute_ms: float
    communication: Cost
    end_ms: float


class Bucket(NamedTuple):
    """Gradients that are summed together.

    Attributes:
        elements: their number.
        ready: share of the backward pass after which they exist.
    """

    elements: float
    ready: float


def buckets(inputs: Inputs) -> Iterator[Bucket]:
    """The gradients of ddp, from the last parameter to the first; inside of a unit they come evenly in time."""
    capacity = min(_MIB, inputs.bucket_mb * _MIB) / _FP32
    total_share = sum(unit.share for unit in inputs.units) or 1.0
    filled, passed = 0.0, 0.0
    for unit in reversed(inputs.units):
        share, left = unit.share / total_share, float(unit.trained)
        while left >= capacity - filled and left > 0:
            left -= capacity - filled
            yield Bucket(capacity, passed + share * (1 - left / unit.trained))
            filled, capacity = 0.0, inputs.bucket_mb * _MIB / _FP32
        filled, passed = filled + left, passed + share
    if filled > 0:
        yield Bucket(filled, 1.0)


def timeline(inputs: Inputs) -> Timeline:
    """Plays the passes of a step."""
    return _ddp(inputs) if inputs.strategy == "ddp" else _sharded(inputs)


def _ddp(inputs: Inputs) -> Timeline:
    forward, backward = inputs.crowding * inputs.forward_ms, inputs.crowding * inputs.backward_ms
    link, total = 0.0, Cost()
    for bucket in buckets(inputs) if inputs.gpus > 1 else ():
        cost = inputs.all_gpus.all_reduce(inputs.gradient_bytes * bucket.elements)
        link = max(link, forward + bucket.ready * backward) + cost.ms
        total = total.plus(cost)
    return Timeline(forward + backward, total, max(forward + backward, link))


class _Links:
    """The clocks of the links inside of a group and between groups, and what has gone over them."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.inside, self.outside, self.total = 0.0, 0.0, Cost()

    def gather(self, parameters: int, asked: float) -> float:
        """When parameters are there."""
        cost = self.inputs.sharing.gather(self.inputs.parameter_bytes * parameters)
        self.inside = max(self.inside, asked) + cost.ms
        self.total = self.total.plus(cost)
        return self.inside

    def reduce(self, trained: int, asked: float) -> None:
        """Scatters gradients, and sums the shares between groups."""
        payload = self.inputs.gradient_bytes * trained
        cost = self.inputs.sharing.reduce_scatter(payload)
        self.inside = max(self.inside, asked) + cost.ms
        across = self.inputs.replicas.all_reduce(payload / self.inputs.sharing.ranks)
        self.outside = max(self.outside, self.inside) + across.ms
        self.total = self.total.plus(cost).plus(across)


def _sharded(inputs: Inputs) -> Timeline:
    shares = sum(unit.share for unit in inputs.units) or 1.0
    forward, backward = (inputs.crowding * ms / shares for ms in (inputs.forward_ms, inputs.backward_ms))
    links = _Links(inputs)
    clock = began = 0.0
    for unit in inputs.units:
        began = max(clock, links.gather(unit.parameters, asked=began))
        clock = began + forward * unit.share
    arrived = links.gather(inputs.units[-1].parameters, asked=clock) if inputs.reshard else clock
    for number in reversed(range(len(inputs.units))):
        began = max(clock, arrived)
        if inputs.reshard and number > 0:
            arrived = links.gather(inputs.units[number - 1].parameters, asked=began)
        clock = began + backward * inputs.units[number].share
        links.reduce(inputs.units[number].trained, asked=clock)
    compute = inputs.crowding * (inputs.forward_ms + inputs.backward_ms)
    return Timeline(compute, links.total, max(clock, links.inside, links.outside))
