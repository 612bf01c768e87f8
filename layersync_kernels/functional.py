"""Every op as users call it: stateless, documented, any leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import _dispatch
from .ops.cosine_alignment import cosine_alignment, cosine_alignment_reference

__all__ = ["layersync_loss"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layersync_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    teacher_grad: bool = False,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    r"""LayerSync's alignment term: the negative cosine similarity of a block's tokens to those of a deeper block.

    .. math:: L = -\frac{\sum_n w_n \cos(s_n, t_n)}{\sum_n w_n}

    Statistics and reductions are fp32, whatever the inputs' dtype; rows of any magnitude neither overflow nor divide by
    zero. One pass over both tensors forward, one backward; 12 bytes a token are saved beyond the inputs.

    Args:
        student: (..., D) hidden tokens of the shallow block, usually (B, N, D); float32, bfloat16 or float16, and
            float64 through the reference. The last dimension should be contiguous, rows may have any stride (a slice
            of tokens, a transpose to (N, B, D)); other layouts cost a copy.
        teacher: (..., D) hidden tokens of the deep block, same shape; its dtype may differ from the student's.
        mask: bool, True for tokens that count, broadcast over the leading dimensions: per token (B, N), per position
            (N,), per sample (B, 1) or (B,). Masked tokens are not read and may hold NaN.
        token_weight: float weight of each token, shaped like `mask`; multiplied with it. It is not differentiated.
        reduction: "mean" (over the sum of weights; 0 where everything is masked), "sum" (the weighted sum), or "none"
            (−w·cos per token: −cos where no weight is given, 0 where masked).
        teacher_grad: differentiate the teacher too. By default it is a constant, as in the paper (stop-gradient).
        eps: a token whose norm is below it has cosine 0 and gradient 0.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        fp32 (fp64 for fp64 inputs): a 0-d tensor, or the leading dimensions for "none". No tokens, or D = 0: 0.

    Raises:
        ValueError: shapes or devices that differ, a mask that does not broadcast or is ambiguous, unknown reduction or
            backend, eps that is not positive.
        TypeError: tensors that are not floating point, a mask that is not bool, weights that are not float.
        RuntimeError: a backend that was asked for and cannot run; double backward.

    Source: the LayerSync paper's loss; gradient −(w/Σw)·(t̂ − c·ŝ)/‖s‖.
    """
    _check_pair(student, teacher)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"layersync_loss: unknown reduction={reduction!r}; expected 'mean', 'sum' or 'none'")
    if not eps > 0:
        raise ValueError(f"layersync_loss: eps must be positive, got {eps}")
    weight = None
    if mask is not None or token_weight is not None:
        weight = _row_weights(student, mask, token_weight)
    dtype = student.dtype if teacher.dtype != torch.float64 else torch.float64
    name = _dispatch.resolve(backend, student.device.type, dtype)
    if name == "reference":
        return cosine_alignment_reference(student, teacher, weight, eps, reduction, teacher_grad)
    if weight is not None:
        weight = weight.to(torch.float32).expand(student.shape[:-1]).reshape(-1).contiguous()
    return cosine_alignment(student, teacher, weight, eps, reduction, teacher_grad, name)


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"layersync_loss: {name} must be a tensor (..., D), got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"layersync_loss: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"layersync_loss: student and teacher must have equal shapes (..., D), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; drop extra tokens or project to the teacher's width first"
        )
    if student.dim() == 0:
        raise ValueError("layersync_loss: student and teacher need a channel dimension (..., D), got 0-d tensors")
    if student.device != teacher.device:
        raise ValueError(
            f"layersync_loss: student is on {student.device} and teacher on {teacher.device}; move one of them"
        )


def _row_weights(student: Tensor, mask: Tensor | None, token_weight: Tensor | None) -> Tensor:
    """Mask · token_weight, broadcastable to the leading dimensions of the student."""
    weight = None
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"layersync_loss: mask must be bool (True counts), got {mask.dtype}; use token_weight=")
        weight = _broadcast("mask", mask, student)
    if token_weight is not None:
        if not token_weight.is_floating_point():
            raise TypeError(f"layersync_loss: token_weight must be floating point, got {token_weight.dtype}")
        if token_weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "layersync_loss: token_weight is not differentiated; detach() it, or weight the terms of "
                'reduction="none" yourself'
            )
        factor = _broadcast("token_weight", token_weight, student)
        # A product would keep a NaN weight under the mask alive.
        weight = factor if weight is None else torch.where(weight, factor, 0)
    assert weight is not None
    return weight


def _broadcast(name: str, weight: Tensor, student: Tensor) -> Tensor:
    """View `weight` so that it broadcasts to the leading dimensions: aligned right as usual, or left, per sample."""
    leading = student.shape[:-1]
    if weight.device != student.device:
        raise ValueError(f"layersync_loss: {name} is on {weight.device}, student and teacher on {student.device}")
    fits_right = weight.dim() <= len(leading) and all(
        w in (1, n) for w, n in zip(reversed(weight.shape), reversed(leading), strict=False)
    )
    missing = len(leading) - weight.dim()
    fits_left = missing > 0 and weight.dim() > 0 and tuple(weight.shape) == tuple(leading[: weight.dim()])
    if fits_left and fits_right and weight.numel() > 1:
        raise ValueError(
            f"layersync_loss: {name} of shape {tuple(weight.shape)} is ambiguous for leading dimensions "
            f"{tuple(leading)}; give {(*weight.shape, *[1] * missing)} for one value per sample or "
            f"{(*[1] * missing, *weight.shape)} for one per token"
        )
    if fits_right:
        return weight
    if fits_left:
        return weight.reshape(*weight.shape, *[1] * missing)
    raise ValueError(
        f"layersync_loss: {name} of shape {tuple(weight.shape)} does not broadcast to the leading dimensions "
        f"{tuple(leading)} of student {tuple(student.shape)}; expected one value per token or per sample"
    )
