"""GELU and its derivative in the epilogues of cuBLASLt, which save one pass over memory each.

Never taken by rule: others have seen the library pick slower GEMMs with these epilogues than without (for bf16 in
karpathy/llm.c#338). `layersync tune` measures both, and `tests/ops/test_block_ops_gpu.py` compares them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime import environment
from .. import raw_op
from ..registry import Route

_HALVES = (torch.bfloat16, torch.float16)
_WISH = environment.CUBLASLT.get()
ENABLED = _WISH == "1"
_NAME = "cublaslt"


def _obstacle(dtype: torch.dtype) -> str | None:
    if _WISH == "0":
        return f"switched off by {environment.CUBLASLT.name}=0"
    if _WISH not in ("auto", "1"):
        return f"unknown {environment.CUBLASLT.name}={_WISH}; expected auto, 0 or 1"
    return None if dtype in _HALVES else f"cuBLASLt's epilogues are for half precision, the tensors are {dtype}"


ROUTE = Route("cuda", _obstacle, forced=ENABLED)


def with_route(overloads: dict[str, Any]) -> dict[str, Any]:
    """A raw op's overloads by backend, and by this route's name, whose other kernels are those of its backend."""
    return {**overloads, _NAME: overloads[ROUTE.backend]}


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], weight.shape[0]
    return x.new_empty(shape), x.new_empty(shape)


def _fake_backward(d_output: Tensor, weight2: Tensor, preactivation: Tensor) -> tuple[Tensor, Tensor]:
    return preactivation.new_empty(preactivation.shape), preactivation.new_empty(preactivation.shape[1:])


# x: (M, I), weight: (O, I), bias: (O,), of one half type. Returns gelu(x·Wᵀ + b) and its pre-activation, both (M, O).
# The activation is that of the unrounded pre-activation.
FORWARD = raw_op.declare("linear_gelu_gemm", _fake_forward, kind="products", backends=("cuda",), kept=True)["cuda"]
# d_output: (M, O), weight2: (O, H), preactivation: (M, H) contiguous, of one half type. Returns the gradient of the
# pre-activation and the column sums of that gradient, which the library can give in their half type only.
BACKWARD = raw_op.declare("gelu_mlp_gemm_backward", _fake_backward, kind="products", backends=("cuda",))["cuda"]


def supports(backend: str, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether a GEMM of (M, K) rows with a weight is to run with its epilogue: asked for, and within cuBLASLt's limits.

    These are half types, and widths and row strides that are multiples of 8: the pre-activation's stride must be one,
    and 16-byte accesses need the rest.
    """
    if not (backend == _NAME or (ENABLED and backend == ROUTE.backend)) or rows.dtype not in _HALVES:
        return False
    if bias is not None and bias.stride(0) != 1:
        return False
    return weight.shape[0] % 8 == 0 and _aligned_rows(rows) and _aligned_rows(weight)


def _aligned_rows(matrix: Tensor) -> bool:
    (count, width), (stride, inner) = matrix.shape, matrix.stride()
    return count > 0 and width > 0 and width % 8 == 0 and inner == 1 and stride >= width and stride % 8 == 0
