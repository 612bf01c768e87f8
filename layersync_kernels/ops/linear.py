"""What the ops between two linear layers share: the gradients of the layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .autograd import differentiable_once


def mlp_gradients(
    wanted: Sequence[bool],
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    d_output: Tensor,
    hidden: Tensor,
    d_inner: Tensor,
    d_bias1: Tensor,
    bias_dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """Gradients of x, weight1, bias1, weight2 and bias2 of linear(f(linear(x))), differentiable once.

    Args:
        wanted: of these, in their order; None is given for the others.
        x: (M, I).
        weight1: (W, I).
        weight2: (O, H).
        d_output: (M, O), the gradient of the output.
        hidden: (M, H), what f has given; read for the gradient of weight2 alone.
        d_inner: (M, W), the gradient of what the first layer has given.
        d_bias1: float32 (W,), its sum over rows; read where it is wanted.
        bias_dtypes: of both biases.
    """
    gradients = (
        torch.mm(d_inner, weight1) if wanted[0] else None,
        torch.mm(d_inner.t(), x) if wanted[1] else None,
        d_bias1.to(bias_dtypes[0]) if wanted[2] else None,
        torch.mm(d_output.t(), hidden) if wanted[3] else None,
        d_output.sum(dim=0, dtype=torch.float32).to(bias_dtypes[1]) if wanted[4] else None,
    )
    return [None if g is None else differentiable_once(g, d_output, x, weight1, weight2) for g in gradients]
