"""Alignment of the similarities between tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import dispatch
from ..ops.gram_alignment import KINDS, gram_alignment, gram_alignment_reference
from .checks import check_devices, check_mask, check_positive, check_reduction, check_tokens


def gram_alignment_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    margin: float = 0.0,
    kind: str = "relu",
    mask: Tensor | None = None,
    reduction: str = "mean",
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    r"""How far the cosines between the student's tokens are from those between the teacher's, over all pairs of tokens.

    .. math:: L = \frac{1}{N^2} \sum_{ij} f(d_{ij}), \quad d_{ij} = |\cos(s_i, s_j) - \cos(t_i, t_j)|

    for each sample, averaged over samples. Neither matrix of cosines exists as a whole: memory is O(N·D), forward and
    backward. The widths may differ, so no projector is needed. Norms and sums are fp32, autocast changes nothing. The
    products are those of unit rows in fp32 (TF32 where `torch.backends.cuda.matmul` allows it); for half types in fp16
    on a GPU, and in bf16 on a CPU where both tensors are. What is rounded then is d, not the two cosines.

    Args:
        student: (..., N, D1) tokens; float32, bfloat16 or float16, and float64 through the reference, which keeps
            several (N, N) matrices.
        teacher: (..., N, D2) tokens, with the same leading dimensions; a constant. Its dtype may differ.
        margin: difference that costs nothing; not negative.
        kind: f. "relu" is max(d - margin, 0): VideoREPA's token relation distillation over the tokens of a video, and
            VA-VAE's matrix term. "square" is its square: at margin 0 the structural term of SARA and U-REPA. "abs" is d
            where d > margin, else 0.
        mask: bool, broadcast over (..., N), True for tokens that count. Pairs of them alone count, N is their number;
            other tokens may hold NaN. A sample without any is left out of the mean over samples.
        reduction: "mean", or "none" for the value of each sample (0 where the mask leaves nothing).
        eps: a token whose norm is below it has cosine 0 with all tokens, itself included, and gradient 0.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        fp32 (fp64 for fp64 inputs): a 0-d tensor, or the leading dimensions for "none". 0 where there are no tokens,
        and up to rounding where the mask leaves one: a token's cosine with itself is 1 on both sides.

    Raises:
        ValueError: another number of tokens, or other leading dimensions; N = 1, whose value would always be 0; a
            negative margin; unknown kind, reduction or backend; a mask that does not broadcast; eps that is not
            positive; tensors on different devices.
        TypeError: tensors that are not dense or not floating point, a mask that is not bool.
        RuntimeError: a backend that was asked for and cannot run; double backward.

    Source: VideoREPA (arXiv:2505.23656) and VA-VAE, with their published code; U-REPA; SARA.
    """
    _check_gram(student, teacher, margin, kind, mask)
    check_reduction("gram_alignment_loss", reduction, ("mean", "none"))
    check_positive("gram_alignment_loss", "eps", eps)
    if mask is not None:
        mask = mask.expand(student.shape[:-1])
    dtype = student.dtype if teacher.dtype != torch.float64 else torch.float64
    name = dispatch.resolve("gram_alignment_loss", backend, student.device.type, dtype, tokens=student)
    if name == "reference":
        values = gram_alignment_reference(student, teacher, mask, margin, kind, eps)
    else:
        values = gram_alignment(student, teacher, mask, float(margin), kind, eps, name)
    if reduction == "none":
        return values
    if mask is None:
        return values.mean() if values.numel() else values.sum()
    return values.sum() / mask.any(dim=-1).sum().clamp(min=1)


def _check_gram(student: Tensor, teacher: Tensor, margin: float, kind: str, mask: Tensor | None) -> None:
    for name, tensor in (("student", student), ("teacher", teacher)):
        check_tokens("gram_alignment_loss", name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"gram_alignment_loss: {name} must be (..., N, D), got {tuple(tensor.shape)}")
    check_devices("gram_alignment_loss", student, teacher)
    if student.shape[-2] != teacher.shape[-2]:
        raise ValueError(
            f"gram_alignment_loss: {student.shape[-2]} student tokens and {teacher.shape[-2]} teacher tokens; drop "
            "extra tokens, or interpolate one of them to the other's grid (torch.nn.functional.interpolate)"
        )
    if student.shape[:-2] != teacher.shape[:-2]:
        raise ValueError(
            f"gram_alignment_loss: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree but "
            "for their widths"
        )
    if student.shape[-2] == 1:
        raise ValueError(
            f"gram_alignment_loss: {tuple(student.shape)} is one token a sample, whose only cosine is 1 on both sides: "
            "give all tokens of a sample as (..., N, D)"
        )
    if not margin >= 0:
        raise ValueError(f"gram_alignment_loss: margin must not be negative, got {margin}")
    if kind not in KINDS:
        raise ValueError(f"gram_alignment_loss: unknown kind={kind!r}; expected one of {', '.join(map(repr, KINDS))}")
    if mask is None:
        return
    check_mask("gram_alignment_loss", mask)
    if mask.device != student.device:
        raise ValueError(f"gram_alignment_loss: mask is on {mask.device}, student and teacher on {student.device}")
    leading = student.shape[:-1]
    fits = zip(reversed(mask.shape), reversed(leading), strict=False)
    if mask.dim() > len(leading) or not all(m in (1, n) for m, n in fits):
        raise ValueError(
            f"gram_alignment_loss: mask of shape {tuple(mask.shape)} does not broadcast to the tokens {tuple(leading)}"
        )
