"""How the processes of a run share a model: each has all of it, or a part."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ...errors import ConfigError
from ..batch import Share
from ..config.optim import OptimConfig
from ..config.parallel import ParallelConfig
from ..models.sit import SiT
from .processes import Processes
from .shards import DrawnAsOne

N = TypeVar("N", bound=nn.Module)


class Parallel:
    """Data parallelism by PyTorch's own engines: DDP, FSDP2 and HSDP; nothing at all for a single process.

    Args:
        config: which one.
        processes: that share the work.
        device: of this one.
        dtype: what autocast computes in, in which weights of blocks are then gathered; None: fp32.

    Attributes:
        processes: those.
        sharded: whether weights are divided.

    Raises:
        ConfigError: processes that do not make whole copies of the weights.
    """

    def __init__(
        self,
        config: ParallelConfig,
        processes: Processes,
        device: torch.device,
        *,
        dtype: torch.dtype | None,
    ) -> None:
        self.processes, self._device = processes, device
        self._make: Callable[[], SiT] | None = None
        self.sharded = processes.world > 1 and config.parallel != "ddp"
        self._reshard = config.reshard
        self._mesh = _mesh(config, processes, device) if self.sharded else None
        # Autocast would round the weights of blocks to that type anyway, after twice the bytes had been sent; the rest
        # is left alone: positions and the residual stream stay fp32. Gradients are summed in fp32.
        self._blocks = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        self._rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)

    def build(self, make: Callable[[], SiT]) -> SiT:
        """The model that `make` gives, on the device, with the same weights as a single process draws.

        Where weights are divided, it is made on the meta device, divided, and only then drawn: beside its part a
        process never holds more than one whole tensor.
        """
        self._make = make
        if self._mesh is None:
            return make().to(self._device)
        with torch.device("meta"), DrawnAsOne():
            model = make()
        self._divide(model, reshard=self._reshard)
        model.to_empty(device=self._device)
        with DrawnAsOne():
            model.initialize_weights()
        return model

    def copy(self, model: SiT) -> SiT:
        """Another one like the model that was built, with its weights and no gradients, in evaluation mode."""
        if self._mesh is None:
            twin = copy.deepcopy(model)
        else:
            assert self._make is not None
            with torch.device("meta"):
                twin = self._make()
            self._divide(twin, reshard=True)  # no backward pass drops what a forward pass has gathered
            twin.to_empty(device=self._device)
            with torch.no_grad():
                for target, source in zip(twin.parameters(), model.parameters(), strict=True):
                    target.copy_(source)
        return twin.requires_grad_(False).eval()

    def divide(self, module: N) -> N:
        """A small module beside the model, which all processes hold whole, divided in place."""
        if self._mesh is not None and any(True for _ in module.parameters()):
            fully_shard(module, mesh=self._mesh, reshard_after_forward=self._reshard, mp_policy=self._rest)
        return module

    def _divide(self, model: SiT, *, reshard: bool) -> None:
        assert self._mesh is not None
        for block in model.blocks:
            fully_shard(block, mesh=self._mesh, reshard_after_forward=reshard, mp_policy=self._blocks)
        fully_shard(model, mesh=self._mesh, reshard_after_forward=reshard, mp_policy=self._rest)

    def replicate(self, network: nn.Module, *, unused: bool) -> nn.Module:
        """What to call in place of `network`, so that gradients are means over processes.

        Args:
            network: returns tensors, from which gradients flow back into its parameters.
            unused: whether some steps leave out some of the parameters.
        """
        if self.sharded or self.processes.world == 1:
            return network
        return DistributedDataParallel(network, gradient_as_bucket_view=True, find_unused_parameters=unused)


@contextlib.contextmanager
def gradients_kept(network: nn.Module, divided: Sequence[nn.Module], *, last: bool) -> Iterator[None]:
    """Around the forward and backward pass of a part of a batch: gradients are exchanged after the `last` one only."""
    for module in divided:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
    if isinstance(network, DistributedDataParallel) and not last:
        with network.no_sync():
            yield
    else:
        yield


def share_of(optim: OptimConfig, processes: Processes) -> Share:
    """What a process has of a batch.

    Raises:
        ConfigError: batches do not divide into equal parts.
    """
    parts = processes.world * optim.accumulate
    if optim.batch_size % parts:
        passes = f" and --accumulate {optim.accumulate}" if optim.accumulate > 1 else ""
        raise ConfigError(
            f"--batch-size {optim.batch_size}, which is that of all processes, does not divide into {processes.world} "
            f"processes{passes}; give a multiple of {parts}"
        )
    return Share(processes.rank, processes.world, optim.accumulate)


def _mesh(config: ParallelConfig, processes: Processes, device: torch.device) -> DeviceMesh:
    world = processes.world
    if config.parallel == "fsdp":
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    size = config.shard_size or processes.local_world
    if not 1 < size < world or world % size:
        raise ConfigError(
            f"--parallel hsdp with --shard-size {size}: {world} processes do not make several copies of that many; "
            "give a divisor of the number of processes, above 1 and below it, or use --parallel fsdp (one copy) or ddp "
            "(a copy each)"
        )
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))
