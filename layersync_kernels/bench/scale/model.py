"""A training step on many GPUs, on paper: memory, time, traffic, checkpoints and data.

Pure functions of `Inputs`. Nothing here is measured; what an input is worth is up to who gives it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .inputs import Inputs
from .schedule import timeline

_FP32 = 4
_IN_FLIGHT = 2  # units whose parameters, or gradients, are whole at a time: the one at work and the next or the last

ASSUMPTIONS = (
    "a model, not a measurement: nothing was run on these GPUs",
    "every link and every collective reaches its full rate, alone and at every size; no other job shares them",
    "communication takes nothing from compute: no multiprocessors, no memory bandwidth, no power",
    "all GPUs are equally fast, none fails or waits for data; a checkpoint stops training while it is written",
    "blocks take equal shares of a pass, a third of which is forward; what is outside of blocks takes no time",
    "the latency of a collective is that of its steps; launches, kernels' tails and rendezvous cost nothing",
)
"""What an estimate rests on; to be shown with it."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU.

    Attributes:
        weights: fp32 parameters.
        copies: of them in the dtype of matrix products: autocast's, or what is gathered at a time.
        gradients: fp32, and those of units on their way to be scattered.
        optimizer: its states.
        ema: moving averages.
        activations: kept between the passes.
    """

    weights: float
    copies: float
    gradients: float
    optimizer: float
    ema: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Estimate:
    """Of a step, on paper.

    Attributes:
        memory: of a GPU.
        compute_ms: forward, backward and update.
        communication_ms: of all collectives, hidden or not.
        exposed_ms: of them, what compute waits for.
        step_ms: compute and exposed communication; without checkpoints.
        images_per_s: of all GPUs, without checkpoints.
        efficiency: images/s over those of as many single GPUs with the same batch each.
        wire_bytes: that a GPU sends in a step, and receives as many.
        between_bytes: those of them that leave the node, the mean over its GPUs.
        checkpoint_bytes: of all files.
        checkpoint_rank_bytes: that a process writes, of those that write.
        checkpoint_s: until all is written.
        checkpoint_share: of the time, where one is written every so many steps.
        data_gbs: 1e9 bytes of data a second, of all GPUs.
    """

    memory: Memory
    compute_ms: float
    communication_ms: float
    exposed_ms: float
    step_ms: float
    images_per_s: float
    efficiency: float
    wire_bytes: float
    between_bytes: float
    checkpoint_bytes: float
    checkpoint_rank_bytes: float
    checkpoint_s: float
    checkpoint_share: float
    data_gbs: float

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Estimate:
        """The inverse of `dataclasses.asdict`, after JSON."""
        return cls(**{**values, "memory": Memory(**values["memory"])})


def memory(inputs: Inputs) -> Memory:
    """Bytes of a GPU.

    16 bytes a parameter where AdamW has two moments, as ZeRO counts (Rajbhandari et al. 2020, arXiv:1910.02054), but
    in autocast's layout: fp32 parameters (4), gradients (4) and moments (8), all divided by the shards; ZeRO's own are
    a half copy and half gradients (2 + 2) beside 12 bytes of the optimiser. On top come the copies of autocast or the
    gathered units, 4 bytes for each average, and activations. DDP's buckets are the gradients themselves
    (`gradient_as_bucket_view`). It is the sum: where gradients are made anew in each step, activations have gone when
    the last of them come, and the peak is lower.
    """
    shards, largest = inputs.shards, max(inputs.units)
    copies, moving = float(inputs.copy_bytes), 0.0
    if shards > 1:
        whole = _IN_FLIGHT * largest.parameters if inputs.reshard else inputs.parameters
        copies = float(inputs.parameter_bytes * min(whole, inputs.parameters))
        moving = float(inputs.gradient_bytes * min(_IN_FLIGHT * largest.trained, inputs.trained))
    return Memory(
        weights=_FP32 * inputs.parameters / shards,
        copies=copies,
        gradients=_FP32 * inputs.trained / shards + moving,
        optimizer=_FP32 * inputs.optimizer_states * inputs.trained / shards,
        ema=_FP32 * inputs.ema_copies * inputs.parameters / shards,
        activations=float(inputs.activation_bytes),
    )


def checkpoint(inputs: Inputs) -> tuple[float, float, float]:
    """A checkpoint: bytes of all files, bytes of a process that writes, seconds.

    Weights, averages and the optimiser's states in fp32, as the trainer keeps them. ddp: one process writes all. fsdp:
    each writes its shard. hsdp: the GPUs of one node do. The seconds are the longer of what a node's bytes take at
    `storage_gbs` and a process's at `writer_gbs`.
    """
    size = float(_FP32 * ((1 + inputs.ema_copies) * inputs.parameters + inputs.optimizer_states * inputs.trained))
    rank = size / inputs.shards
    node = rank * min(inputs.shards, inputs.all_gpus.per_node)
    return size, rank, max(node / inputs.storage_gbs, rank / inputs.writer_gbs) / 1e9


def estimate(inputs: Inputs) -> Estimate:
    """All of it.

    The step is compute and what is exposed of the communication. Of that, `schedule.timeline` says what could hide;
    `overlap` is the share of it that does. The update is done by each GPU for its own shard.
    """
    played = timeline(inputs)
    update = inputs.crowding * inputs.update_ms / inputs.shards
    hidden = inputs.overlap * (played.compute_ms + played.communication.ms - played.end_ms)
    exposed = played.communication.ms - hidden
    compute = played.compute_ms + update
    step = compute + exposed
    single = inputs.forward_ms + inputs.backward_ms + inputs.update_ms
    images_per_s = 1e3 * inputs.gpus * inputs.batch / step
    size, rank, seconds = checkpoint(inputs)
    return Estimate(
        memory=memory(inputs),
        compute_ms=compute,
        communication_ms=played.communication.ms,
        exposed_ms=exposed,
        step_ms=step,
        images_per_s=images_per_s,
        efficiency=single / step,
        wire_bytes=played.communication.sent,
        between_bytes=played.communication.between,
        checkpoint_bytes=size,
        checkpoint_rank_bytes=rank,
        checkpoint_s=seconds,
        checkpoint_share=seconds / (seconds + inputs.checkpoint_every * step / 1e3),
        data_gbs=images_per_s * inputs.bytes_per_sample / 1e9,
    )
