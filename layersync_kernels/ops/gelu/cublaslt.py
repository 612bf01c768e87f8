"""GELU and its derivative in the epilogues of cuBLASLt, which save one pass over memory each.

Off by default: nobody has measured them on a card yet, and others have seen the library pick slower GEMMs with these
epilogues than without (for bf16 in karpathy/llm.c#338). `tests/ops/test_block_ops_gpu.py` compares both paths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import environment
from .. import raw_op

ENABLED = environment.CUBLASLT.get() == "1"


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
    if not ENABLED or backend != "cuda" or rows.dtype not in (torch.bfloat16, torch.float16):
        return False
    if bias is not None and bias.stride(0) != 1:
        return False
    return weight.shape[0] % 8 == 0 and _aligned_rows(rows) and _aligned_rows(weight)


def _aligned_rows(matrix: Tensor) -> bool:
    (count, width), (stride, inner) = matrix.shape, matrix.stride()
    return count > 0 and width > 0 and width % 8 == 0 and inner == 1 and stride >= width and stride % 8 == 0
