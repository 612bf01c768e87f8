"""GELU and its derivative in the epilogues of cuBLASLt, which save one pass over memory each.

Never taken by rule: others have seen the library pick slower GEMMs with these epilogues than without (for bf16 in
karpathy/llm.c#338), and so has an H100 (docs/h100.md). `layersync tune` measures both, and
`tests/ops/test_block_ops_gpu.py` compares them. Where the library has no plan for an epilogue, its plain product and
our pass run in its place, inside of the raw op: a compiled graph cannot know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime import environment
from ..registry import Route
from . import raw

_WISH = environment.CUBLASLT.get()
ENABLED = _WISH == "1"
FORWARD, BACKWARD = raw.GEMM_FORWARD["cuda"], raw.GEMM_BACKWARD["cuda"]


def _obstacle(dtype: torch.dtype) -> str | None:
    if _WISH == "0":
        return f"switched off by {environment.CUBLASLT.name}=0"
    if _WISH not in ("auto", "1"):
        return f"unknown {environment.CUBLASLT.name}={_WISH}; expected auto, 0 or 1"
    return None if dtype in raw.HALVES else f"cuBLASLt's epilogues are for half precision, the tensors are {dtype}"


ROUTE = Route("cuda", _obstacle, forced=ENABLED)


def backward(
    d_output: Tensor, weight2: Tensor, preactivation: Tensor, activation: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `epilogue.Epilogue.backward`; the activation is a pass of its own."""
    d_preactivation, d_bias = BACKWARD(d_output, weight2, preactivation)
    value = raw.FORWARD[ROUTE.backend](preactivation) if activation else preactivation[:0]
    return d_preactivation, value, d_bias
