"""The alignment term of LayerSync: the negative cosine of the tokens of two blocks, made by the op cosine_alignment."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import compiled, dispatch
from ..ops.cosine_alignment import cosine_alignment, cosine_alignment_reference, reduce_rows
from .checks import (
    check_dense,
    check_devices,
    check_positive,
    check_reduction,
    check_tokens,
    flat_weights,
    row_weights,
)


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
        backend: "auto", "reference", "cpp", "triton", "cuda" or "compile" (the reference under torch.compile).

    Returns:
        fp32 (fp64 for fp64 inputs): a 0-d tensor, or the leading dimensions for "none". No tokens, or D = 0: 0.

    Raises:
        ValueError: shapes or devices that differ, a mask that does not broadcast or is ambiguous, unknown reduction or
            backend, eps that is not positive.
        TypeError: tensors that are not dense or not floating point, a mask that is not bool, weights that are not
            float.
        RuntimeError: a backend that was asked for and cannot run; double backward.

    Source: the LayerSync paper's loss; gradient −(w/Σw)·(t̂ − c·ŝ)/‖s‖.
    """
    _check_pair(student, teacher)
    check_reduction("layersync_loss", reduction)
    check_positive("layersync_loss", "eps", eps)
    weight = row_weights("layersync_loss", student, mask, token_weight)
    dtype = student.dtype if teacher.dtype != torch.float64 else torch.float64
    name = dispatch.resolve("layersync_loss", backend, student.device.type, dtype, tokens=student)
    if name in dispatch.PLAIN:
        reference = compiled.plain("layersync_loss", name, cosine_alignment_reference, student.shape[-1])
        return reference(student, teacher, weight, eps, reduction, teacher_grad)
    return cosine_alignment(student, teacher, flat_weights(weight, student), eps, reduction, teacher_grad, name)


def cosine_loss(
    cosine: Tensor, *, mask: Tensor | None = None, token_weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """`layersync_loss` from the cosines of the tokens: -Σ w·cosine / Σ w, 0 where all weights are.

    Args:
        cosine: (...) fp32, one per token, as `aligned_residual_norm` gives it.
        mask: bool, True for tokens that count, broadcast as in `layersync_loss`. Those it leaves out may hold NaN.
        token_weight: float weight of each token, shaped like `mask`; multiplied with it. It is not differentiated.
        reduction: "mean" (over the sum of weights), "sum" (the weighted sum), or "none" (−w·cosine per token).

    Returns:
        The cosine's dtype: a 0-d tensor, or like `cosine` for "none". Errors as `layersync_loss`.
    """
    check_dense("cosine_loss", "cosine", cosine)
    check_reduction("cosine_loss", reduction)
    return _negative_reduced("cosine_loss", cosine, mask, token_weight, reduction)


def weighted_mean(op: str, values: Tensor, mask: Tensor | None, token_weight: Tensor | None) -> Tensor:
    """Σ w·value / Σ w of one value for each token, 0 where all weights are; w = mask · token_weight.

    Args:
        op: whose arguments they are, for messages.
        values: (...), of floating point. Those under the mask may hold NaN.
        mask: as in `layersync_loss`, or None.
        token_weight: as in `layersync_loss`, or None.
    """
    return _negative_reduced(op, -values, mask, token_weight, "mean")


def _negative_reduced(
    op: str, values: Tensor, mask: Tensor | None, token_weight: Tensor | None, reduction: str
) -> Tensor:
    weight = row_weights(op, values.unsqueeze(-1), mask, token_weight)
    if weight is not None:
        weight = weight.to(values.dtype).expand(values.shape)
    return reduce_rows(values, weight, reduction)


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    for name, tensor in (("student", student), ("teacher", teacher)):
        check_tokens("layersync_loss", name, tensor)
    if student.shape != teacher.shape:
        raise ValueError(
            f"layersync_loss: student and teacher must have equal shapes (..., D), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; drop extra tokens or project to the teacher's width first"
        )
    check_devices("layersync_loss", student, teacher)
