"""What the public ops check of their inputs, and the casts that autocast asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_reduction(op: str, reduction: str, eps: float = 1.0) -> None:
    """Raises ValueError for an unknown reduction, or an eps that is not positive."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: unknown reduction={reduction!r}; expected 'mean', 'sum' or 'none'")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be positive, got {eps}")


def check_devices(op: str, student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError for tensors on two devices."""
    if student.device != teacher.device:
        raise ValueError(f"{op}: student is on {student.device} and teacher on {teacher.device}; move one of them")


def row_weights(op: str, tokens: Tensor, mask: Tensor | None, token_weight: Tensor | None) -> Tensor:
    """Mask · token_weight, broadcastable to the leading dimensions of the tokens."""
    weight = None
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be bool (True counts), got {mask.dtype}; use token_weight=")
        weight = broadcast(op, "mask", mask, tokens)
    if token_weight is not None:
        if not token_weight.is_floating_point():
            raise TypeError(f"{op}: token_weight must be floating point, got {token_weight.dtype}")
        if token_weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: token_weight is not differentiated; detach() it, or weight the terms of "
                'reduction="none" yourself'
            )
        factor = broadcast(op, "token_weight", token_weight, tokens)
        # A product would keep a NaN weight under the mask alive.
        weight = factor if weight is None else torch.where(weight, factor, 0)
    assert weight is not None
    return weight


def broadcast(op: str, name: str, weight: Tensor, tokens: Tensor) -> Tensor:
    """View `weight` so that it broadcasts to the leading dimensions: aligned right as usual, or left, per sample."""
    leading = tokens.shape[:-1]
    if weight.device != tokens.device:
        raise ValueError(f"{op}: {name} is on {weight.device}, the tokens on {tokens.device}")
    fits_right = weight.dim() <= len(leading) and all(
        w in (1, n) for w, n in zip(reversed(weight.shape), reversed(leading), strict=False)
    )
    missing = len(leading) - weight.dim()
    fits_left = missing > 0 and weight.dim() > 0 and tuple(weight.shape) == tuple(leading[: weight.dim()])
    if fits_left and fits_right and weight.numel() > 1:
        raise ValueError(
            f"{op}: {name} of shape {tuple(weight.shape)} is ambiguous for leading dimensions "
            f"{tuple(leading)}; give {(*weight.shape, *[1] * missing)} for one value per sample or "
            f"{(*[1] * missing, *weight.shape)} for one per token"
        )
    if fits_right:
        return weight
    if fits_left:
        return weight.reshape(*weight.shape, *[1] * missing)
    raise ValueError(
        f"{op}: {name} of shape {tuple(weight.shape)} does not broadcast to the leading dimensions "
        f"{tuple(leading)} of tokens {tuple(tokens.shape)}; expected one value per token or per sample"
    )


def check_tokens(op: str, name: str, tensor: Tensor, like: Tensor | None = None, other: str = "x") -> None:
    """Raises TypeError for what is no floating tensor, ValueError without channels or on another device than `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor (..., D), got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} needs a channel dimension (..., D), got a 0-d tensor")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device} and {other} on {like.device}; move one of them")


def linear_inputs(
    op: str,
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    backend: str,
    name: str = "x",
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...], str]:
    """Check the inputs of a chain of linear layers and cast them as autocast does. `name` is what x is called."""
    check_tokens(op, name, x)
    width = x.shape[-1]
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        suffix = "" if len(weights) == 1 else str(number)
        check_tokens(op, f"weight{suffix}", weight, x, name)
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(
                f"{op}: weight{suffix} {tuple(weight.shape)} must have the shape (out, {width}): "
                f"its input has {width} channels"
            )
        width = weight.shape[0]
        if bias is not None:
            check_tokens(op, f"bias{suffix}", bias, x, name)
            if bias.shape != (width,):
                raise ValueError(f"{op}: bias{suffix} {tuple(bias.shape)} must have the shape ({width},)")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)

        def cast(tensor: Tensor) -> Tensor:
            return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

        x, weights = cast(x), tuple(map(cast, weights))
        biases = tuple(None if bias is None else cast(bias) for bias in biases)
    dtypes = {t.dtype for t in (x, *weights, *biases) if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"{op}: {name}, weights and biases must have one dtype outside autocast, got {dtypes}")
    return x, weights, biases, dispatch.resolve(op, backend, device, x.dtype)
