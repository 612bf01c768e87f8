"""What the model is given: counts of a network, times of one GPU, links, and how the work is spread."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...sit.config import at_least, positive, require
from .collectives import Group
from .links import Link

STRATEGIES = {
    "ddp": "each GPU holds everything; gradients are summed in buckets while the backward pass runs",
    "fsdp": "each GPU holds its share of everything; parameters are gathered a block at a time (ZeRO-3)",
    "hsdp": "shares inside of a node, as fsdp; between nodes the shares of the gradients are summed",
}
"""Ways to spread a model over GPUs."""


class Unit(NamedTuple):
    """What is gathered and whose gradient is complete at a time: a block, or all that is outside of blocks.

    Attributes:
        parameters: their number.
        trained: of those, the ones that have a gradient.
        share: of the time of a pass.
    """

    parameters: int
    trained: int
    share: float


@dataclass(frozen=True)
class Inputs:
    """All that the model knows.

    Attributes:
        gpus: their number; those of one node, or of full nodes.
        gpus_per_node: in a full node.
        strategy: key of `STRATEGIES`.
        units: of the network, in the order of the forward pass.
        batch: samples of a GPU in a step.
        forward_ms, backward_ms: of one GPU that is alone, with that batch.
        update_ms: of the optimiser and the moving averages, of all parameters on one GPU.
        intra, inter: links inside of a node and between nodes, of each GPU.
        parameter_bytes, gradient_bytes: of an element on the wire.
        copy_bytes: that copies of all parameters for matrix products hold where none are gathered (autocast's).
        activation_bytes: that a GPU keeps between the passes, with that batch.
        optimizer_states: fp32 numbers a trained parameter.
        ema_copies: moving averages, in fp32.
        overlap: share of the communication that hides, of what could.
        reshard: whether gathered parameters are dropped after the forward pass, and gathered again.
        bucket_mb: MiB of fp32 gradients that ddp sums at a time; the first bucket has 1 at most.
        checkpoint_every: steps between checkpoints.
        storage_gbs: 1e9 bytes a second that a node writes.
        writer_gbs: 1e9 bytes a second that a process writes.
        bytes_per_sample: of the data, as it is read.
        cores: that all processes share, where they run on a CPU: compute slows by their number over that of the cores.
            None: each has a processor of its own.

    Raises:
        ConfigError: numbers out of range, or that do not go together.
    """

    gpus: int
    gpus_per_node: int
    strategy: str
    units: tuple[Unit, ...]
    batch: int
    forward_ms: float
    backward_ms: float
    update_ms: float
    intra: Link
    inter: Link
    parameter_bytes: int = 2
    gradient_bytes: int = 4
    copy_bytes: int = 0
    activation_bytes: int = 0
    optimizer_states: int = 2
    ema_copies: int = 1
    overlap: float = 1.0
    reshard: bool = True
    bucket_mb: float = 25.0
    checkpoint_every: int = 5_000
    storage_gbs: float = 3.5
    writer_gbs: float = 1.1
    bytes_per_sample: float = 0.0
    cores: int | None = None

    def __post_init__(self) -> None:
        at_least(1, gpus=self.gpus, gpus_per_node=self.gpus_per_node, batch=self.batch)
        at_least(1, checkpoint_every=self.checkpoint_every, cores=self.cores)
        at_least(0, ema_copies=self.ema_copies, optimizer_states=self.optimizer_states)
        at_least(0, bytes_per_sample=self.bytes_per_sample, update_ms=self.update_ms)
        positive(forward_ms=self.forward_ms, backward_ms=self.backward_ms, bucket_mb=self.bucket_mb)
        positive(storage_gbs=self.storage_gbs, writer_gbs=self.writer_gbs)
        require(self.strategy in STRATEGIES, f"--strategy {self.strategy}: expected one of {', '.join(STRATEGIES)}")
        require(0 <= self.overlap <= 1, f"--overlap {self.overlap}: expected a share from 0 to 1")
        require(bool(self.units), "units: expected at least one, the network has none")
        require(
            self.gpus <= self.gpus_per_node or self.gpus % self.gpus_per_node == 0,
            f"--gpus {self.gpus} do not fill nodes of {self.gpus_per_node}: expected a multiple of that, or fewer than "
            "one node has; --gpus-per-node changes it",
        )
        require(
            self.strategy != "hsdp" or self.gpus >= self.gpus_per_node,
            f"--strategy hsdp shards inside of a node of {self.gpus_per_node} GPUs; --gpus {self.gpus} are fewer: "
            "expected full nodes, or --strategy fsdp",
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Inputs:
        """The inverse of `dataclasses.asdict`, after JSON."""
        known = dict(values)
        known["units"] = tuple(Unit(*unit) for unit in known["units"])
        known["intra"], known["inter"] = Link(**known["intra"]), Link(**known["inter"])
        return cls(**known)

    def alone(self) -> Inputs:
        """One GPU with the same batch, whose times the model takes as given."""
        return dataclasses.replace(self, gpus=1, gpus_per_node=1, strategy="ddp")

    @property
    def parameters(self) -> int:
        """Of the whole network."""
        return sum(unit.parameters for unit in self.units)

    @property
    def trained(self) -> int:
        """Those of them that have a gradient."""
        return sum(unit.trained for unit in self.units)

    @property
    def nodes(self) -> int:
        """Their number."""
        return max(1, self.gpus // self.gpus_per_node)

    @property
    def shards(self) -> int:
        """Over how many GPUs the state of training is spread."""
        return {"ddp": 1, "fsdp": self.gpus, "hsdp": self.gpus_per_node}[self.strategy]

    @property
    def crowding(self) -> float:
        """By what compute is slower than that of one process alone."""
        return 1.0 if self.cores is None else max(1.0, self.gpus / self.cores)

    @property
    def all_gpus(self) -> Group:
        """The group of all."""
        return Group(self.nodes, self.gpus // self.nodes, self.intra, self.inter)

    @property
    def sharing(self) -> Group:
        """The group over which parameters are spread, of fsdp and hsdp."""
        return Group(1, self.gpus_per_node, self.intra, self.inter) if self.strategy == "hsdp" else self.all_gpus

    @property
    def replicas(self) -> Group:
        """The group of those that hold the same share, one in each node, of hsdp."""
        return Group(self.nodes if self.strategy == "hsdp" else 1, 1, self.intra, self.inter)
