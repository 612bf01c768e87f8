"""Linear layers with tanh-GELU: the GEMMs are the library's, the activation is one pass forward and one backward.

On the routes "cublaslt" and "quack", and where LAYERSYNC_CUBLASLT=1 asks for the former, the pass behind a GEMM rides
in that GEMM's epilogue (epilogue.py).

Story of the op: forward keeps the pre-activation u, and the activation only where it is told to. Backward reads the
gradient of the activation and u, and writes the gradient of u, with the sum over rows for the bias, and where the
second linear layer needs it, the activation once more: recomputing it there costs one write, and saves the largest
tensor of the block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import FusedFunction, differentiable_once
from ..linear import mlp_gradients
from ..registry import Op, register
from . import epilogue
from .raw import BACKWARD, FORWARD
from .reference import linear_gelu_reference

register(Op("gelu", ("linear_gelu", "gelu_mlp"), linear_gelu_reference, uncompiled=None, routes=epilogue.ROUTES))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """(activation, pre-activation)."""
    library = epilogue.serving(backend, x, weight, bias)
    if library is not None:
        return library.forward(x, weight, bias)
    preactivation = _linear(x, weight, bias)
    return FORWARD[epilogue.kernels_of(backend)](preactivation), preactivation


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
        d_pre, _, d_bias = BACKWARD[epilogue.kernels_of(ctx.backend)](d_activation, preactivation, False, wanted[2])
        gradients = (
            torch.mm(d_pre, weight) if wanted[0] else None,
            torch.mm(d_pre.t(), x) if wanted[1] else None,
            d_bias.to(ctx.bias_dtype) if wanted[2] else None,
        )
        saved = (d_activation, x, weight)
        return *(None if g is None else differentiable_once(g, *saved) for g in gradients), None


class GeluMlp(FusedFunction):
    """Linear, GELU, linear for x (M, I). Saves x, both weights, the pre-activation, and the activation if told to."""

    @staticmethod
    def forward(
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        backend: str,
        keep: bool,
    ) -> tuple[Tensor, ...]:
        """(output (M, O), pre-activation (M, H)), and to keep it the activation (M, H)."""
        activation, preactivation = _linear_gelu(x, weight1, bias1, backend)
        output = _linear(activation, weight2, bias2)
        return (output, preactivation, activation) if keep else (output, preactivation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the backward pass reads."""
        x, weight1, bias1, weight2, bias2, backend, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight1, weight2, *output[1:])
        ctx.bias_dtypes = tuple(None if bias is None else bias.dtype for bias in (bias1, bias2))
        ctx.backend = backend

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, both weights and both biases."""
        if d_output is None:
            return (None,) * 7
        x, weight1, weight2, preactivation, *kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        again = wanted[3] and not kept
        library = epilogue.serving(ctx.backend, d_output, weight2)
        if library is not None:
            d_pre, activation, d_bias1 = library.backward(d_output, weight2, preactivation, again, wanted[2])
        else:
            d_activation = torch.mm(d_output, weight2)
            kernel = BACKWARD[epilogue.kernels_of(ctx.backend)]
            d_pre, activation, d_bias1 = kernel(d_activation, preactivation, again, wanted[2])
        activation = kept[0] if kept else activation
        gradients = mlp_gradients(wanted, x, weight1, weight2, d_output, activation, d_pre, d_bias1, ctx.bias_dtypes)
        return *gradients, None, None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """Run the fused op on a resolved backend: x (M, I), weight (O, I), bias (O,), all of one dtype → (M, O)."""
    activation, _ = LinearGelu.run(x, weight, bias, backend)
    return activation


def gelu_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    backend: str,
    keep_activation: bool,
) -> Tensor:
    """Run the fused op on a resolved backend: x (M, I), weight1 (H, I), weight2 (O, H), one dtype → (M, O).

    The activation is kept where a backward pass would otherwise have to compute it by a pass or a write more.
    """
    library = epilogue.named(backend)
    keep = keep_activation and not (library is not None and library.recomputes)
    output, *_ = GeluMlp.run(x, weight1, bias1, weight2, bias2, backend, keep)
    return output
