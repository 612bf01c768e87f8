"""Tensors that are divided among processes: the own part of one, the whole of it, drawing it as one process does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a view of it, and all of one that is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is divided, all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(values: Tensor, other: Tensor) -> Tensor:
    """A tensor, divided as another one of its shape is: of a whole one that each process has, its part.

    It is returned as it is where the other one is whole, or where it is divided itself, which then has to be the same.
    """
    if not isinstance(other, DTensor) or isinstance(values, DTensor):
        return values
    return distribute_tensor(values.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


@torch.no_grad()
def copy_into(target: Tensor, values: Tensor) -> None:
    """Gives a tensor, of which each process may hold a part, the values of another one, see `divided_like`."""
    own_part(target).copy_(own_part(divided_like(values.expand(target.shape), target)))


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies whole tensors, of the names and shapes of its state, into a module."""
    for name, target in module.state_dict().items():
        copy_into(target, tensors[name])


class DrawnAsOne(TorchDispatchMode):
    """Inside, random numbers are those that a single process draws for whole tensors on the CPU.

    A tensor that is divided gets its part of them; one on the meta device leaves the generator where the numbers would
    have left it. No more than one whole tensor is there at a time.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Draws, or leaves an op as it is."""
        kwargs = kwargs or {}
        target = args[0] if args else None
        if func in _DRAWS and isinstance(target, Tensor) and (isinstance(target, DTensor) or target.is_meta):
            values = func(torch.empty(target.shape, dtype=target.dtype, device="cpu"), *args[1:], **kwargs)
            if isinstance(target, DTensor):
                copy_into(target, values)
            return target
        if func is torch.ops.aten.copy_.default and isinstance(target, DTensor) and not isinstance(args[1], DTensor):
            copy_into(target, args[1])
            return target
        return func(*args, **kwargs)


_DRAWS = (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)
