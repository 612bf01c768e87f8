"""Linear layers with tanh-GELU: the GEMMs are the library's, the activation is one pass forward and one backward.

On the route "cublaslt", and where LAYERSYNC_CUBLASLT=1 asks for it, the pass behind a GEMM rides in that GEMM's
epilogue (cublaslt.py).

Story of the op: forward keeps the pre-activation u alone. Backward reads the gradient of the activation and u, and
writes the gradient of u, with the sum over rows for the bias, and where the second linear layer needs it, the
activation once more: recomputing it there costs one write, and saves the largest tensor of the block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import raw_op
from ..autograd import FusedFunction, differentiable_once
from ..registry import Op, register
from . import cublaslt
from .reference import linear_gelu_reference

register(
    Op("gelu", ("linear_gelu", "gelu_mlp"), linear_gelu_reference, uncompiled=None, routes={"cublaslt": cublaslt.ROUTE})
)


def _fake_forward(preactivation: Tensor) -> Tensor:
    return preactivation.new_empty(preactivation.shape)


def _fake_backward(
    d_activation: Tensor, preactivation: Tensor, activation: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape, width = preactivation.shape, preactivation.shape[-1]
    return (
        preactivation.new_empty(shape),
        preactivation.new_empty(shape if activation else (0,)),
        preactivation.new_empty((width if bias else 0,), dtype=torch.float32),
    )


# preactivation: (M, W) contiguous. Returns its tanh-GELU.
FORWARD = cublaslt.with_route(
    raw_op.declare("gelu_forward", _fake_forward, kind="gelu", python={"triton": "triton:forward"})
)
# d_activation: (M, W) of preactivation's dtype, at any row stride. Returns, contiguous: the gradient of the
# preactivation; the activation, or (0,) where not wanted; the column sums of that gradient, unrounded, in float32, or
# (0,) where not wanted.
BACKWARD = cublaslt.with_route(
    raw_op.declare("gelu_backward", _fake_backward, kind="gelu", python={"triton": "triton:backward"})
)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """(activation, pre-activation)."""
    if cublaslt.supports(backend, x, weight, bias):
        return cublaslt.FORWARD(x, weight, bias)
    preactivation = _linear(x, weight, bias)
    return FORWARD[backend](preactivation), preactivation


class LinearGelu(FusedFunction):
    """gelu(x·Wᵀ + b) for x (M, I). Saves x, W and the pre-activation."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        """(activation, pre-activation), both (M, O)."""
        return _linear_gelu(x, weight, bias, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward pass reads."""
        x, weight, bias, backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, output[1])
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.backend = backend

    @staticmethod
    def backward(ctx: Any, d_activation: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        if d_activation is None:
            return (None,) * 4
        x, weight, preactivation = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        d_pre, _, d_bias = BACKWARD[ctx.backend](d_activation, preactivation, False, wanted[2])
        gradients = (
            torch.mm(d_pre, weight) if wanted[0] else None,
            torch.mm(d_pre.t(), x) if wanted[1] else None,
            d_bias.to(ctx.bias_dtype) if wanted[2] else None,
        )
        saved = (d_activation, x, weight)
        return *(None if g is None else differentiable_once(g, *saved) for g in gradients), None


class GeluMlp(FusedFunction):
    """Linear, GELU, linear for x (M, I). Saves x, both weights and the pre-activation, but not the activation."""

    @staticmethod
    def forward(
        x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        """(output (M, O), pre-activation (M, H))."""
        activation, preactivation = _linear_gelu(x, weight1, bias1, backend)
        return _linear(activation, weight2, bias2), preactivation

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward pass reads."""
        x, weight1, bias1, weight2, bias2, backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight1, weight2, output[1])
        ctx.bias_dtypes = tuple(None if bias is None else bias.dtype for bias in (bias1, bias2))
        ctx.backend = backend

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, both weights and both biases."""
        if d_output is None:
            return (None,) * 6
        x, weight1, weight2, preactivation = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if cublaslt.supports(ctx.backend, d_output, weight2):
            d_pre, d_bias1 = cublaslt.BACKWARD(d_output, weight2, preactivation)
            activation = FORWARD[ctx.backend](preactivation) if wanted[3] else preactivation[:0]
        else:
            d_activation = torch.mm(d_output, weight2)
            d_pre, activation, d_bias1 = BACKWARD[ctx.backend](d_activation, preactivation, wanted[3], wanted[2])
        gradients = (
            torch.mm(d_pre, weight1) if wanted[0] else None,
            torch.mm(d_pre.t(), x) if wanted[1] else None,
            d_bias1.to(ctx.bias_dtypes[0]) if wanted[2] else None,
            torch.mm(d_output.t(), activation) if wanted[3] else None,
            d_output.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtypes[1]) if wanted[4] else None,
        )
        saved = (d_output, x, weight1, weight2)
        return *(None if g is None else differentiable_once(g, *saved) for g in gradients), None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """Run the fused op on a resolved backend: x (M, I), weight (O, I), bias (O,), all of one dtype → (M, O)."""
    activation, _ = LinearGelu.run(x, weight, bias, backend)
    return activation


def gelu_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, backend: str
) -> Tensor:
    """Run the fused op on a resolved backend: x (M, I), weight1 (H, I), weight2 (O, H), one dtype → (M, O)."""
    output, _ = GeluMlp.run(x, weight1, bias1, weight2, bias2, backend)
    return output
