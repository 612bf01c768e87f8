"""The raw ops: what the kernels compute, and the products whose epilogue has it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import raw_op
from ..registry import Beside

HALVES = (torch.bfloat16, torch.float16)
"""What products with an epilogue are for."""


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


def _fake_gemm_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], weight.shape[0]
    return x.new_empty(shape), x.new_empty(shape)


def _fake_gemm_backward(d_output: Tensor, weight2: Tensor, preactivation: Tensor) -> tuple[Tensor, Tensor]:
    return preactivation.new_empty(preactivation.shape), preactivation.new_empty(preactivation.shape[1:])


def _fake_gemm_recompute(d_output: Tensor, weight2: Tensor, preactivation: Tensor) -> tuple[Tensor, Tensor]:
    return preactivation.new_empty(preactivation.shape), preactivation.new_empty(preactivation.shape)


# preactivation: (M, W) contiguous. Returns its tanh-GELU.
FORWARD = raw_op.declare("gelu_forward", _fake_forward, kind="gelu", python={"triton": "triton:forward"})
# d_activation: (M, W) of preactivation's dtype, at any row stride. Returns, contiguous: the gradient of the
# preactivation; the activation, or (0,) where not wanted; the column sums of that gradient, unrounded, in float32, or
# (0,) where not wanted.
BACKWARD = raw_op.declare("gelu_backward", _fake_backward, kind="gelu", python={"triton": "triton:backward"})

# x: (M, I), weight: (O, I), bias: (O,), of one half type. Returns gelu(x·Wᵀ + b) and its pre-activation, both (M, O).
# The activation is that of the unrounded pre-activation.
GEMM_FORWARD = raw_op.declare(
    "linear_gelu_gemm",
    _fake_gemm_forward,
    kind="products",
    backends=("cuda", "quack"),
    python={"quack": "quack:linear_gelu"},
    kept=True,
    beside=Beside("gelu", results=(1,)),
)
# d_output: (M, O), weight2: (O, H), preactivation: (M, H) contiguous, of one half type. Returns the gradient of the
# pre-activation and the column sums of that gradient, which cuBLASLt can give in their half type only.
GEMM_BACKWARD = raw_op.declare(
    "gelu_mlp_gemm_backward",
    _fake_gemm_backward,
    kind="products",
    backends=("cuda",),
    beside=Beside("gelu", arguments=("preactivation",)),
)
# The same arguments. Returns the gradient of the pre-activation and the activation.
GEMM_RECOMPUTE = raw_op.declare(
    "gelu_mlp_gemm_recompute",
    _fake_gemm_recompute,
    kind="products",
    backends=("quack",),
    python={"quack": "quack:recompute"},
    beside=Beside("gelu", arguments=("preactivation",), results=(1,)),
)
