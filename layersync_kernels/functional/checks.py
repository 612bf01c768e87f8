"""What the public ops check of their inputs, and the casts that autocast asks for.

A check takes the name of the op, and that of the argument, for its message: what came, what was expected, what to do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..ops import dispatch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, nn.Parameter)


def check_reduction(op: str, reduction: str, expected: Sequence[str] = ("mean", "sum", "none")) -> None:
    """Raises ValueError for a reduction that is not among the expected ones."""
    if reduction not in expected:
        *others, last = map(repr, expected)
        raise ValueError(f"{op}: unknown reduction={reduction!r}; expected {', '.join(others)} or {last}")


def check_positive(op: str, name: str, value: float) -> None:
    """Raises ValueError for what is not above zero, as NaN is not."""
    if not value > 0:
        raise ValueError(f"{op}: {name} must be positive, got {value}")


def check_devices(op: str, student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError for tensors on two devices."""
    if student.device != teacher.device:
        raise ValueError(f"{op}: student is on {student.device} and teacher on {teacher.device}; move one of them")


def check_dense(
    op: str,
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype] = FLOATS,
    expected: str = "float32, bfloat16, float16 or float64",
    advice: str = "",
) -> None:
    """Raises TypeError for what the kernels cannot read: no tensor, values that are not at its strides, another dtype.

    Taken are tensors and parameters, also as functorch wraps them; meta and fake tensors; subclasses that leave it to
    torch what an op does with their memory. Sparse, nested and quantised tensors and subclasses with a
    `__torch_dispatch__` of their own, as DTensor, are not.

    Args:
        op: for the message.
        name: of the argument.
        tensor: what came.
        dtypes: those that it may have.
        expected: the same in words.
        advice: what to do about another dtype.
    """
    # Hardly any call comes past the condition, but each pays for it.
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_nested:
        _check_unusual(op, name, tensor)
    if tensor.dtype not in dtypes:
        if tensor.is_quantized:
            came, advice = f"a quantised tensor ({tensor.dtype})", "; give its dequantize()"
        else:
            came = str(tensor.dtype)
        raise TypeError(f"{op}: {name} must be {expected}, got {came}{advice}")


def _check_unusual(op: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        came = f"a nested tensor ({tensor.layout})"
        advice = "torch.nested.to_padded_tensor() pads it; a mask, where the op takes one, leaves the padding out"
    elif not _keeps_its_values_itself(type(tensor)):
        came = f"a {type(tensor).__name__}, which wraps other tensors"
        advice = (
            "give this process's part, to_local(), or the whole, full_tensor()"
            if hasattr(tensor, "to_local")
            else "give the dense tensor inside of it"
        )
    elif tensor.layout is not torch.strided:
        sparse = str(tensor.layout).startswith("torch.sparse")
        came = f"a sparse tensor ({tensor.layout})" if sparse else f"a tensor of layout {tensor.layout}"
        advice = "give its to_dense()"
    else:
        return
    raise TypeError(f"{op}: {name} must be a dense torch.Tensor, got {came}; {advice}")


def _keeps_its_values_itself(cls: type[Tensor]) -> bool:
    """Whether a class's tensors are dense ones, or stand for one: while torch traces, or until a collective is done."""
    if cls.__torch_dispatch__ is Tensor.__torch_dispatch__ or issubclass(cls, FakeTensor | FunctionalTensor):
        return True
    collectives = sys.modules.get("torch.distributed._functional_collectives")  # what to_local() gives may wait for one
    return collectives is not None and issubclass(cls, collectives.AsyncCollectiveTensor)


_keeps_its_values_itself._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in dispatch


def check_tokens(op: str, name: str, tensor: Tensor, like: Tensor | None = None, other: str = "x") -> None:
    """Raises TypeError for what is no dense floating tensor, ValueError without channels or on another device.

    Args:
        op: for the message, as `name`.
        name: of the argument.
        tensor: (..., D).
        like: a tensor that must be on the same device.
        other: the name of `like`.
    """
    # The conditions of check_dense, whose call alone would cost a small op one part in a hundred for each tensor.
    if (
        type(tensor) not in _PLAIN
        or tensor.dtype not in FLOATS
        or tensor.layout is not torch.strided
        or tensor.is_nested
    ):
        check_dense(op, name, tensor)
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} needs a channel dimension (..., D), got a 0-d tensor")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device} and {other} on {like.device}; move one of them")


def check_vector(
    op: str, name: str, tensor: Tensor, other: str, like: Tensor, shape: tuple[int, ...], what: str
) -> None:
    """Raises TypeError for what is no dense floating vector beside tokens, ValueError for its shape or device.

    Args:
        op: for the message.
        name: of the argument.
        tensor: what came.
        other: the name of the tokens.
        like: the tokens.
        shape: what is expected.
        what: the same in words.
    """
    check_tokens(op, name, tensor, like, other)
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} {tuple(tensor.shape)} must have the shape {tuple(shape)}, {what}")


def check_lengths(op: str, lengths: Tensor, tokens: Tensor) -> None:
    """Raises TypeError for what is no dense int64, ValueError for other than one length for each of tokens (B, ...)."""
    check_dense(op, "lengths", lengths, (torch.int64,), "int64")
    if lengths.shape != tokens.shape[:1] or lengths.device != tokens.device:
        raise ValueError(
            f"{op}: lengths are {tuple(lengths.shape)} on {lengths.device}; expected ({tokens.shape[0]},), one for "
            f"each sample, on {tokens.device}"
        )


def check_mask(op: str, mask: Tensor, advice: str = "") -> None:
    """Raises TypeError for what is no dense tensor of bool."""
    check_dense(op, "mask", mask, (torch.bool,), "bool (True counts)", advice)


def row_mask(op: str, mask: Tensor, tokens: Tensor) -> Tensor:
    """The mask, checked, as a view that broadcasts to the leading dimensions of the tokens."""
    check_mask(op, mask, "; use token_weight=")
    return broadcast(op, "mask", mask, tokens)


def row_weights(op: str, tokens: Tensor, mask: Tensor | None, token_weight: Tensor | None) -> Tensor | None:
    """What each row counts: mask · token_weight, checked; None where neither is given, and all count alike.

    Args:
        op: for messages.
        tokens: (..., D), whose rows are weighted.
        mask: bool, True for rows that count; see `broadcast` for its shape.
        token_weight: floating point, shaped like a mask.

    Returns:
        Broadcasts to the leading dimensions of the tokens; a bool mask where no weight is given.

    Raises:
        TypeError: a mask that is not bool, a weight that is not floating point, neither dense.
        ValueError: one that does not broadcast or is on another device; a weight that requires grad.
    """
    counted = None if mask is None else row_mask(op, mask, tokens)
    if token_weight is None:
        return counted
    check_dense(op, "token_weight", token_weight, expected="floating point")
    if token_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f'{op}: token_weight is not differentiated; detach() it, or weight the terms of reduction="none" yourself'
        )
    weight = broadcast(op, "token_weight", token_weight, tokens)
    # Not a product, in which a NaN under the mask would stay alive.
    return weight if counted is None else torch.where(counted, weight, 0)


def flat_weights(weight: Tensor | None, tokens: Tensor) -> Tensor | None:
    """One fp32 value for each row of the tokens, in one dimension, as the kernels read what `row_weights` gives."""
    if weight is None:
        return None
    return weight.to(torch.float32).expand(tokens.shape[:-1]).reshape(-1).contiguous()


def broadcast(op: str, name: str, weight: Tensor, tokens: Tensor) -> Tensor:
    """View a mask or weight so that it broadcasts to the leading dimensions of the tokens (..., D).

    It may have as many dimensions as they, or fewer: the last ones, as broadcasting aligns them ((N,) of (B, N): one
    for each position), or exactly the first ones ((B,) of (B, N): one for each sample).

    Raises:
        ValueError: a shape that fits neither way, or both with different meanings; another device.
    """
    leading = tuple(tokens.shape[:-1])
    shape = tuple(weight.shape)
    if weight.device != tokens.device:
        raise ValueError(f"{op}: {name} is on {weight.device}, the tokens on {tokens.device}")
    missing = len(leading) - len(shape)
    fits_last = missing >= 0 and all(w in (1, n) for w, n in zip(shape, leading[missing:], strict=True))
    fits_first = missing > 0 and len(shape) > 0 and shape == leading[: len(shape)]
    if fits_last and fits_first and weight.numel() > 1:
        raise ValueError(
            f"{op}: {name} of shape {shape} is ambiguous for leading dimensions {leading}; give "
            f"{(*shape, *[1] * missing)} for one value per sample or {(*[1] * missing, *shape)} for one per token"
        )
    if fits_last:
        return weight
    if fits_first:
        return weight.reshape(*shape, *[1] * missing)
    raise ValueError(
        f"{op}: {name} of shape {shape} does not broadcast to the leading dimensions {leading} of tokens "
        f"{tuple(tokens.shape)}; expected one value per token or per sample"
    )


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on a type of device; None where it is off, or where there is none (meta)."""
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def linear_inputs(
    op: str,
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    backend: str,
    name: str = "x",
    suffixes: Sequence[str] = (),
    gated: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...], str]:
    """Check the inputs of a chain of linear layers, cast them as autocast does, and choose the backend.

    Args:
        op: for messages.
        x: (..., I).
        weights: of each layer (out, in).
        biases: of each layer (out,), or None.
        backend: what the caller asked for.
        name: what the caller's argument for x is called.
        suffixes: of the names of the weights and biases, where those are not numbered from 1.
        gated: whether a gated linear unit makes one channel of two, behind every layer but the last.

    Returns:
        x, weights, biases, the backend's name.

    Raises:
        ValueError: shapes that do not fit, tensors on several devices.
        TypeError: what is no dense floating tensor; several dtypes outside autocast.
        RuntimeError: a backend that was asked for and cannot run.
    """
    check_tokens(op, name, x)
    width = x.shape[-1]
    suffixes = suffixes or [""] * (len(weights) == 1) or [str(number + 1) for number in range(len(weights))]
    for place, (suffix, weight, bias) in enumerate(zip(suffixes, weights, biases, strict=True)):
        check_tokens(op, f"weight{suffix}", weight, x, name)
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(
                f"{op}: weight{suffix} {tuple(weight.shape)} must have the shape (out, {width}): "
                f"its input has {width} channels"
            )
        width = weight.shape[0]
        halved = gated and place < len(weights) - 1
        if halved and width % 2:
            raise ValueError(f"{op}: weight{suffix} {tuple(weight.shape)} must have two halves of rows, (2·H, in)")
        if bias is not None:
            check_tokens(op, f"bias{suffix}", bias, x, name)
            if bias.shape != (width,):
                raise ValueError(f"{op}: bias{suffix} {tuple(bias.shape)} must have the shape ({width},)")
        width //= 2 if halved else 1
    device = x.device.type
    dtype = autocast_dtype(device)
    if dtype is not None:

        def cast(tensor: Tensor) -> Tensor:
            return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

        x, weights = cast(x), tuple(map(cast, weights))
        biases = tuple(None if bias is None else cast(bias) for bias in biases)
    dtypes = {t.dtype for t in (x, *weights, *biases) if t is not None}
    if len(dtypes) > 1:
        raise TypeError(f"{op}: {name}, weights and biases must have one dtype outside autocast, got {dtypes}")
    return x, weights, biases, dispatch.resolve(op, backend, device, x.dtype, tokens=x)
