"""Linear layers with GELU."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..ops import compiled, dispatch
from ..ops.gelu import gelu_mlp as _gelu_mlp
from ..ops.gelu import gelu_mlp_reference, linear_gelu_reference
from ..ops.gelu import linear_gelu as _linear_gelu
from .checks import linear_inputs

_KEPT = ("preactivation", "activation")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """gelu_tanh(x·Wᵀ + b): the library's GEMM with the activation in one pass behind it.

    Backward fuses the derivative of GELU with the sum over tokens for the bias. Saves x, W and the pre-activation.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,) or None.
        backend: "auto", "reference", "cpp", "triton", "cuda", "compile" (the reference under torch.compile), or a
            library whose GEMM has the activation in its epilogue, in half precision: "cublaslt" (beside "cuda") or
            "quack" (beside "triton"; Hopper and Blackwell, the extra `quack`). What that cannot take (widths or strides
            that are no multiples of 8) goes the plain way.

    Returns:
        (..., O), of the dtype of the inputs; under autocast of the autocast dtype, as `F.linear`.

    Raises:
        ValueError: shapes that do not fit, tensors on several devices.
        TypeError: dtypes that differ (outside autocast); tensors that are not dense or not floating point.
        RuntimeError: a backend that was asked for and cannot run; double backward.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, tanh form.
    """
    x, (weight,), (bias,), name = linear_inputs("linear_gelu", x, (weight,), (bias,), backend)
    if name in dispatch.PLAIN or x.numel() == 0:
        return compiled.plain("linear_gelu", name, linear_gelu_reference, x.shape[-1])(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _linear_gelu(rows, weight, bias, name).view(*x.shape[:-1], weight.shape[0])


def gelu_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    keep: Literal["preactivation", "activation"] = "preactivation",
    backend: str = "auto",
) -> Tensor:
    """Linear, tanh-GELU, linear: the MLP of a DiT block, which keeps its pre-activation but not its activation.

    Backward computes the activation again in the pass that multiplies by the derivative of GELU: (M, H) less memory for
    one more write, where H is the inner width. Results and errors as `linear_gelu`, and ValueError for an unknown
    `keep`.

    Args:
        x: (..., I).
        weight1: (H, I).
        bias1: (H,) or None.
        weight2: (O, H).
        bias2: (O,) or None.
        keep: "activation" keeps the activation too, which is faster where it would be computed again; "quack" has it
            anyway and keeps none. "reference" and "compile" keep what autograd keeps.
        backend: "auto", "reference", "cpp", "triton", "cuda", "compile" (the reference under torch.compile), or a
            library whose GEMM has the activation in its epilogue, in half precision: "cublaslt" (beside "cuda") or
            "quack" (beside "triton"; Hopper and Blackwell, the extra `quack`). What that cannot take (widths or strides
            that are no multiples of 8) goes the plain way.

    Returns:
        (..., O).
    """
    if keep not in _KEPT:
        raise ValueError(f"gelu_mlp: unknown keep={keep!r}; expected {' or '.join(map(repr, _KEPT))}")
    x, (weight1, weight2), (bias1, bias2), name = linear_inputs(
        "gelu_mlp", x, (weight1, weight2), (bias1, bias2), backend
    )
    if name in dispatch.PLAIN or x.numel() == 0:
        reference = compiled.plain("gelu_mlp", name, gelu_mlp_reference, x.shape[-1])
        return reference(x, weight1, bias1, weight2, bias2)
    rows = x.reshape(-1, x.shape[-1])
    return _gelu_mlp(rows, weight1, bias1, weight2, bias2, name, keep == "activation").view(
        *x.shape[:-1], weight2.shape[0]
    )
