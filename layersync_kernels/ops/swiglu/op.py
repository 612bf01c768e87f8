"""Gated linear units, f(x1)·x2 with f SiLU or tanh-GELU: one pass forward and one backward, alone or between two GEMMs.

Story of the op: forward keeps x12 alone. Backward reads the gradient of the product and x12, and writes the gradient of
x12, with the sum over rows for the bias behind it, and where a linear layer follows whose weight needs it, the product
once more: recomputing it there costs one write, and saves a tensor of the inner width. (As in gelu.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import raw_op
from ..autograd import FusedFunction, differentiable_once
from ..linear import mlp_gradients
from ..registry import Op, register
from .reference import swiglu_reference

register(Op("swiglu", ("swiglu", "swiglu_mlp"), swiglu_reference, uncompiled=None))


def _fake_forward(x12: Tensor, gelu: bool, interleaved: bool) -> Tensor:
    return x12.new_empty((*x12.shape[:-1], x12.shape[-1] // 2))


def _fake_backward(
    grad: Tensor, x12: Tensor, gelu: bool, interleaved: bool, output: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x12.new_empty(x12.shape),
        x12.new_empty(grad.shape if output else (0,)),
        x12.new_empty((x12.shape[-1] if bias else 0,), dtype=torch.float32),
    )


# x12: (..., 2·H) at any stride, [x1, x2] or, interleaved, pairs of their values. Returns f(x1)·x2, (..., H),
# contiguous.
FORWARD = raw_op.declare("swiglu_forward", _fake_forward, kind="rows", python={"triton": "triton:forward"})
# grad: (..., H) of x12's dtype, at any stride. Returns, contiguous: the gradient of x12, laid out as that is; the
# product, or (0,) where not wanted; the column sums of that gradient, unrounded, in float32, or (0,) where not wanted.
BACKWARD = raw_op.declare("swiglu_backward", _fake_backward, kind="rows", python={"triton": "triton:backward"})


class Swiglu(FusedFunction):
    """f(x1)·x2. Saves x12."""

    @staticmethod
    def forward(x12: Tensor, gelu: bool, interleaved: bool, backend: str) -> Tensor:
        """The raw op."""
        return FORWARD[backend](x12, gelu, interleaved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward pass reads."""
        x12, ctx.gelu, ctx.interleaved, ctx.backend = inputs
        ctx.save_for_backward(x12)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x12."""
        (x12,) = ctx.saved_tensors
        d_x12, _, _ = BACKWARD[ctx.backend](grad, x12, ctx.gelu, ctx.interleaved, False, False)
        return differentiable_once(d_x12, grad, x12), None, None, None


class SwigluMlp(FusedFunction):
    """Linear, f(x1)·x2, linear for x (M, I). Saves x, both weights and x12, but not the product."""

    @staticmethod
    def forward(
        x: Tensor,
        weight12: Tensor,
        bias12: Tensor | None,
        weight3: Tensor,
        bias3: Tensor | None,
        gelu: bool,
        interleaved: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """(output (M, O), x12 (M, 2·H))."""
        x12 = F.linear(x, weight12, bias12)
        return F.linear(FORWARD[backend](x12, gelu, interleaved), weight3, bias3), x12

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward pass reads."""
        x, weight12, bias12, weight3, bias3, ctx.gelu, ctx.interleaved, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight12, weight3, output[1])
        ctx.bias_dtypes = tuple(None if bias is None else bias.dtype for bias in (bias12, bias3))

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, both weights and both biases."""
        if d_output is None:
            return (None,) * 8
        x, weight12, weight3, x12 = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_x12, product, d_bias12 = BACKWARD[ctx.backend](
            torch.mm(d_output, weight3), x12, ctx.gelu, ctx.interleaved, wanted[3], wanted[2]
        )
        gradients = mlp_gradients(wanted, x, weight12, weight3, d_output, product, d_x12, d_bias12, ctx.bias_dtypes)
        return *gradients, None, None, None


def swiglu(x12: Tensor, gelu: bool, interleaved: bool, backend: str) -> Tensor:
    """Run the fused op on a resolved backend: x12 (..., 2·H) → (..., H)."""
    output: Tensor = Swiglu.run(x12, gelu, interleaved, backend)
    return output


def swiglu_mlp(
    x: Tensor,
    weight12: Tensor,
    bias12: Tensor | None,
    weight3: Tensor,
    bias3: Tensor | None,
    gelu: bool,
    interleaved: bool,
    backend: str,
) -> Tensor:
    """Run the fused op on a resolved backend: x (M, I), weight12 (2·H, I), weight3 (O, H), one dtype → (M, O)."""
    output, _ = SwigluMlp.run(x, weight12, bias12, weight3, bias3, gelu, interleaved, backend)
    return output
