"""Gated linear units."""

from __future__ import annotations

from torch import Tensor

from ..ops import compiled, dispatch
from ..ops.swiglu import swiglu as _swiglu
from ..ops.swiglu import swiglu_mlp as _swiglu_mlp
from ..ops.swiglu import swiglu_mlp_reference, swiglu_reference
from .checks import check_tokens, linear_inputs

ACTIVATIONS = ("silu", "gelu")


def swiglu(x12: Tensor, *, activation: str = "silu", interleaved: bool = False, backend: str = "auto") -> Tensor:
    """The gated linear unit f(x1)·x2 of the two halves of x12, in one pass, and its gradient in another. Saves x12.

    Args:
        x12: (..., 2·H), float32, bfloat16, float16, or float64 through the reference; leading dimensions at any stride.
        activation: "silu" is SwiGLU, "gelu" GEGLU with the tanh form of GELU, as in `linear_gelu`.
        interleaved: False: x1 is the first half of the channels, x2 the second. True: they are the channels with even
            and odd numbers.
        backend: "auto", "reference", "cpp", "triton", "cuda" or "compile" (the reference under torch.compile).

    Returns:
        (..., H) of x12's dtype.

    Raises:
        ValueError: an odd number of channels, an unknown activation.
        TypeError: a tensor that is not dense or not floating point.
        RuntimeError: a backend that was asked for and cannot run; double backward.

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    gelu = _is_gelu("swiglu", activation)
    check_tokens("swiglu", "x12", x12)
    width = x12.shape[-1]
    if width % 2:
        raise ValueError(f"swiglu: x12 must have two halves, (..., 2·H), got {width} channels in {tuple(x12.shape)}")
    name = dispatch.resolve("swiglu", backend, x12.device.type, x12.dtype, tokens=x12, parts=2)
    if name in dispatch.PLAIN or x12.numel() == 0:
        return compiled.plain("swiglu", name, swiglu_reference, width)(x12, gelu, interleaved)
    return _swiglu(x12, gelu, interleaved, name)


def swiglu_mlp(
    x: Tensor,
    weight12: Tensor,
    bias12: Tensor | None,
    weight3: Tensor,
    bias3: Tensor | None,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Linear, f(x1)·x2, linear: the gated MLP, which keeps the result of its first layer but not the product.

    Backward computes the product again in the pass that differentiates it, with the sum over tokens for the first bias:
    (M, H) less memory for one more write. The rule of `gelu_mlp`.

    Args:
        x: (..., I).
        weight12: (2·H, I).
        bias12: (2·H,) or None.
        weight3: (O, H).
        bias3: (O,) or None.
        activation: "silu" or "gelu", see `swiglu`.
        interleaved: how the rows of weight12 are laid out, see `swiglu`.
        backend: "auto", "reference", "cpp", "triton", "cuda" or "compile" (the reference under torch.compile).

    Returns:
        (..., O), of the dtype of the inputs; under autocast of the autocast dtype, as `F.linear`.

    Raises:
        ValueError: shapes that do not fit, an odd number of rows in weight12, an unknown activation, tensors on several
            devices.
        TypeError: dtypes that differ (outside autocast); tensors that are not dense or not floating point.
        RuntimeError: a backend that was asked for and cannot run; double backward.

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    gelu = _is_gelu("swiglu_mlp", activation)
    x, (weight12, weight3), (bias12, bias3), name = linear_inputs(
        "swiglu_mlp", x, (weight12, weight3), (bias12, bias3), backend, suffixes=("12", "3"), gated=True
    )
    if name in dispatch.PLAIN or x.numel() == 0 or weight3.numel() == 0:
        reference = compiled.plain("swiglu_mlp", name, swiglu_mlp_reference, x.shape[-1])
        return reference(x, weight12, bias12, weight3, bias3, gelu, interleaved)
    rows = x.reshape(-1, x.shape[-1])
    output = _swiglu_mlp(rows, weight12, bias12, weight3, bias3, gelu, interleaved, name)
    return output.view(*x.shape[:-1], weight3.shape[0])


def _is_gelu(op: str, activation: str) -> bool:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation={activation!r}; expected {' or '.join(map(repr, ACTIVATIONS))}")
    return activation == "gelu"
