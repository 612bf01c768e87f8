"""Linear layers that leave the gradient of their bias to an op behind them, which sums it in a pass of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is x·Wᵀ + b and no more: it may be computed without being called.

    LoRA, quantised and sharded layers, which are classes of their own, are more, as is one with hooks.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is nn.Linear and not any(hooks)


def lent_bias(layer: nn.Module) -> Tensor | None:
    """The bias of a layer, for an op that sums its gradient, where there will be one; the layer is then to lend it.

    It is a view: wrappers hang hooks on the tensors that a block hands out, and would leave them on the parameter.
    """
    if not is_plain(layer) or not torch.is_grad_enabled():
        return None
    bias = layer.get_parameter("bias") if layer.bias is not None else None
    return bias.view_as(bias) if bias is not None and bias.requires_grad else None


def linear(layer: nn.Module, x: Tensor, *, lend: bool) -> Tensor:
    """A layer's result, without the gradient of its bias if it lends it."""
    if not lend:
        result: Tensor = layer(x)
        return result
    return F.linear(x, layer.get_parameter("weight"), layer.get_parameter("bias").detach())
