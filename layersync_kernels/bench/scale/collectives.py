"""What a collective puts on the wire, and the time of that.

A ring of n GPUs does an all-gather or a reduce-scatter in n - 1 steps, in each of which every GPU sends an n-th of the
bytes to its neighbour; an all-reduce is both, which is optimal in bytes: 2(n - 1)/n of them (Patarasuk and Yuan 2009,
Bandwidth optimal all-reduce algorithms, J. Parallel Distrib. Comput. 69). Over many nodes a ring's steps take longer
than its bytes, and NCCL takes two binary trees (Sanders, Speck and Träff 2009, Parallel Computing 35): twice the bytes,
in logarithmic time. Steps are counted as NCCL's tuner does (src/graph/tuning.cc).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from .links import Link


class Cost(NamedTuple):
    """Of a collective, or of several.

    Attributes:
        sent: bytes that a GPU sends, and receives as many.
        between: those of them that leave the node, the mean over its GPUs.
        ms: of the whole collective.
    """

    sent: float = 0.0
    between: float = 0.0
    ms: float = 0.0

    def plus(self, other: Cost) -> Cost:
        """The sum of both, one after the other."""
        return Cost(self.sent + other.sent, self.between + other.between, self.ms + other.ms)


@dataclass(frozen=True)
class Group:
    """GPUs that work on a collective together.

    Attributes:
        nodes: over which they are spread evenly.
        per_node: GPUs of the group in each.
        intra, inter: links inside of a node and between nodes; of the second, each GPU has one of its own.
    """

    nodes: int
    per_node: int
    intra: Link
    inter: Link

    @property
    def ranks(self) -> int:
        """GPUs."""
        return self.nodes * self.per_node

    @property
    def gigabytes_per_s(self) -> float:
        """Rate of each GPU in rings (or trees) over all of them.

        There is one ring for each GPU of a node, each leaves the node through another GPU's link, and all of them share
        the links inside: the slower of the two limits the rate.
        """
        if self.nodes == 1:
            return self.intra.gigabytes_per_s
        outside = self.per_node * self.inter.gigabytes_per_s
        return outside if self.per_node == 1 else min(self.intra.gigabytes_per_s, outside)

    def _cost(self, sent: float, microseconds: float) -> Cost:
        between = sent / self.per_node if self.nodes > 1 else 0.0
        return Cost(sent, between, sent / self.gigabytes_per_s / 1e6 + microseconds / 1e3)

    def _ring(self, payload: float, rounds: int) -> Cost:
        steps, inter_steps = rounds * (self.ranks - 1), rounds * (self.nodes - 1)
        microseconds = (steps - inter_steps) * self.intra.microseconds + inter_steps * self.inter.microseconds
        return self._cost(rounds * (self.ranks - 1) / self.ranks * payload, microseconds)

    def _trees(self, payload: float) -> Cost:
        inside = (self.per_node - 1) * self.intra.microseconds
        return self._cost(2 * payload, 2 * (inside + math.ceil(math.log2(self.nodes)) * self.inter.microseconds))

    def gather(self, payload: float) -> Cost:
        """All-gather, by a ring.

        Args:
            payload: bytes that each GPU has in the end.
        """
        return self._ring(payload, 1)

    def reduce_scatter(self, payload: float) -> Cost:
        """Reduce-scatter, by a ring.

        Args:
            payload: bytes that each GPU has in the beginning.
        """
        return self._ring(payload, 1)

    def all_reduce(self, payload: float) -> Cost:
        """All-reduce, by a ring or by trees, whichever is faster.

        Args:
            payload: bytes that each GPU has, before and after.
        """
        ring = self._ring(payload, 2)
        return ring if self.ranks == 1 else min(ring, self._trees(payload), key=lambda cost: cost.ms)
