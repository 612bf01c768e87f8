"""Every op as users call it: stateless, documented, any leading dimensions."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .ops import _dispatch
from .ops.attention import self_attention
from .ops.cosine_alignment import cosine_alignment, cosine_alignment_reference, reduce_rows
from .ops.dispersive import dispersive_loss as _dispersive_loss
from .ops.gated_residual_norm import gated_residual_norm as _gated_residual_norm
from .ops.gated_residual_norm import gated_residual_norm_reference
from .ops.gated_residual_norm.groups import as_groups, in_equal_groups
from .ops.gelu import gelu_mlp as _gelu_mlp
from .ops.gelu import gelu_mlp_reference, linear_gelu_reference
from .ops.gelu import linear_gelu as _linear_gelu
from .ops.gram_alignment import KINDS, gram_alignment, gram_alignment_reference
from .ops.projected_alignment import linear_rows, projected_alignment, projected_alignment_reference
from .ops.spatial_norm import spatial_norm as _spatial_norm
from .ops.spatial_norm import spatial_norm_reference

__all__ = [
    "Seam",
    "Tap",
    "aligned_residual_norm",
    "cosine_loss",
    "dispersive_loss",
    "gated_residual",
    "gated_residual_norm",
    "gelu_mlp",
    "gram_alignment_loss",
    "layersync_loss",
    "linear_gelu",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "projected_alignment_loss",
    "self_attention",
    "spatial_norm",
]

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
    _check_reduction("layersync_loss", reduction, eps)
    weight = None
    if mask is not None or token_weight is not None:
        weight = _row_weights("layersync_loss", student, mask, token_weight)
    dtype = student.dtype if teacher.dtype != torch.float64 else torch.float64
    name = _dispatch.resolve(backend, student.device.type, dtype)
    if name == "reference":
        return cosine_alignment_reference(student, teacher, weight, eps, reduction, teacher_grad)
    if weight is not None:
        weight = weight.to(torch.float32).expand(student.shape[:-1]).reshape(-1).contiguous()
    return cosine_alignment(student, teacher, weight, eps, reduction, teacher_grad, name)


def cosine_loss(
    cosine: Tensor, *, mask: Tensor | None = None, token_weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """`layersync_loss` from the cosines of the tokens: -Σ w·cosine / Σ w, 0 where all weights are.

    Args:
        cosine: (...) fp32, one per token, as `aligned_residual_norm` gives it.
        mask: as in `layersync_loss`.
        token_weight: likewise.
        reduction: likewise.

    Returns:
        fp32: a 0-d tensor, or like `cosine` for "none". Raises as `layersync_loss` does.
    """
    _check_reduction("cosine_loss", reduction)
    weight = None
    if mask is not None or token_weight is not None:
        rows = cosine.unsqueeze(-1)
        weight = _row_weights("cosine_loss", rows, mask, token_weight).to(cosine.dtype).expand(cosine.shape)
    return reduce_rows(cosine, weight, reduction)


def _check_reduction(op: str, reduction: str, eps: float = 1.0) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: unknown reduction={reduction!r}; expected 'mean', 'sum' or 'none'")
    if not eps > 0:
        raise ValueError(f"{op}: eps must be positive, got {eps}")


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    for name, tensor in (("student", student), ("teacher", teacher)):
        _check_tokens("layersync_loss", name, tensor)
    if student.shape != teacher.shape:
        raise ValueError(
            f"layersync_loss: student and teacher must have equal shapes (..., D), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; drop extra tokens or project to the teacher's width first"
        )
    _check_devices("layersync_loss", student, teacher)


def _check_devices(op: str, student: Tensor, teacher: Tensor) -> None:
    if student.device != teacher.device:
        raise ValueError(f"{op}: student is on {student.device} and teacher on {teacher.device}; move one of them")


def _row_weights(op: str, tokens: Tensor, mask: Tensor | None, token_weight: Tensor | None) -> Tensor:
    """Mask · token_weight, broadcastable to the leading dimensions of the tokens."""
    weight = None
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be bool (True counts), got {mask.dtype}; use token_weight=")
        weight = _broadcast(op, "mask", mask, tokens)
    if token_weight is not None:
        if not token_weight.is_floating_point():
            raise TypeError(f"{op}: token_weight must be floating point, got {token_weight.dtype}")
        if token_weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: token_weight is not differentiated; detach() it, or weight the terms of "
                'reduction="none" yourself'
            )
        factor = _broadcast(op, "token_weight", token_weight, tokens)
        # A product would keep a NaN weight under the mask alive.
        weight = factor if weight is None else torch.where(weight, factor, 0)
    assert weight is not None
    return weight


def _broadcast(op: str, name: str, weight: Tensor, tokens: Tensor) -> Tensor:
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


def projected_alignment_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """`layersync_loss(F.linear(hidden, weight, bias), teacher)`: a projector's last layer with the alignment behind it.

    The projected tokens never exist as a whole: they and their gradient live a chunk of rows at a time. For "mean" and
    "sum" the gradients come with the loss in one go and wait for the backward pass, which scales them.

    Args:
        hidden: (..., D) tokens, usually (B, N, D).
        weight: (P, D).
        bias: (P,) or None.
        teacher: (..., P), a constant, of any floating dtype: the critic's tokens, one for each of hidden's.
        mask: as in `layersync_loss`.
        token_weight: likewise.
        reduction: likewise.
        eps: likewise.
        backend: likewise.

    Returns:
        fp32 (fp64 for fp64 inputs): a 0-d tensor, or the leading dimensions for "none". Under autocast the projection
        runs in the autocast dtype, as that of `F.linear`.

    Raises:
        ValueError: shapes or devices that do not fit, among them another number of tokens or another width of the
            teacher; otherwise as `layersync_loss`.
        TypeError: hidden, weight and bias of several dtypes outside autocast; otherwise as `layersync_loss`.
        RuntimeError: as `layersync_loss`.

    Source: the alignment term of REPA (Yu et al. 2024, arXiv:2410.06940) with the last layer of its projector.
    """
    op = "projected_alignment_loss"
    x, (projection,), (offset,), name = _linear_inputs(op, hidden, (weight,), (bias,), backend, "hidden")
    _check_tokens(op, "teacher", teacher, hidden, "hidden")
    _check_reduction(op, reduction, eps)
    if teacher.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"{op}: teacher {tuple(teacher.shape)} has {teacher.shape[-1]} channels and weight {tuple(weight.shape)} "
            f"projects to {weight.shape[0]}; give a weight of shape ({teacher.shape[-1]}, {hidden.shape[-1]})"
        )
    if teacher.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: hidden {tuple(hidden.shape)} and teacher {tuple(teacher.shape)} must have the same tokens: "
            f"{tuple(hidden.shape[:-1])} is not {tuple(teacher.shape[:-1])}; drop extra tokens, or interpolate the "
            "teacher's to hidden's grid"
        )
    row_weight = None
    if mask is not None or token_weight is not None:
        row_weight = _row_weights(op, hidden, mask, token_weight)
    if teacher.dtype == torch.float64:
        name = _dispatch.resolve(backend, hidden.device.type, torch.float64)
    if name == "reference" or hidden.numel() == 0 or teacher.numel() == 0:
        return projected_alignment_reference(hidden, weight, bias, teacher, row_weight, eps, reduction)
    if row_weight is not None:
        row_weight = row_weight.to(torch.float32).expand(hidden.shape[:-1]).reshape(-1).contiguous()
    teacher = teacher.detach()
    tokens = hidden.numel() // hidden.shape[-1]
    if backend == "auto" and tokens <= linear_rows(weight.shape[0], x.dtype, x.device.type):
        # There is little memory to save. Linear layer and fused cosine are faster then: 0.66 ms for 0.87 at
        # 1024 x 96 -> 112 in fp32, 0.13 for 0.27 where the calls are all there is.
        if row_weight is not None:  # what is masked may be NaN
            x = x.masked_fill((row_weight == 0).view(*hidden.shape[:-1], 1), 0)
        return cosine_alignment(F.linear(x, projection, offset), teacher, row_weight, eps, reduction, False, name)
    return projected_alignment(x, projection, offset, teacher, row_weight, eps, reduction, name)


def dispersive_loss(
    hidden: Tensor, *, temperature: float = 1.0, gather: dist.ProcessGroup | Literal["world"] | None = None
) -> Tensor:
    r"""Drives the samples of a batch apart: the log of the mean affinity of all pairs, without a teacher.

    .. math:: L = \log \frac{1}{B^2} \sum_{i,j} \exp\left(-\frac{\lVert h_i - h_j\rVert^2}{K\tau}\right)

    All B·B pairs count, a sample with itself too. Matrix products forward and backward, fp32 whatever the dtype (on a
    GPU TF32, where that is allowed), of the samples less their mean: an offset of all samples costs no digits. Memory
    beyond the gradient: (B, B).

    Args:
        hidden: (B, ...), K elements a sample, usually (B, N, D); float32, bfloat16, float16 or float64.
        temperature: τ.
        gather: a process group, or "world": the pairs are those of the batches of all its processes, which must be
            equally large. Each gets the same loss, and its gradient is scaled so that the average over the processes,
            as DDP makes it, is the gradient of that loss for the whole batch; do not scale either of them.

    Returns:
        0-d, fp32 (fp64 for fp64 inputs), between -log B and 0. A batch of one has nothing to part from: 0, gradient 0;
        so has an empty one.

    Raises:
        ValueError: temperature that is not positive.
        TypeError: a tensor that is not floating point.
        RuntimeError: `gather` without torch.distributed; double backward.

    Source: Wang and He 2025, Diffuse and Disperse, arXiv:2506.09027 (its L2 form, as published in PyTorch).
    """
    _check_tokens("dispersive_loss", "hidden", hidden)
    if not temperature > 0:
        raise ValueError(f"dispersive_loss: temperature must be positive, got {temperature}")
    if gather is not None and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("dispersive_loss: gather needs torch.distributed.init_process_group, or leave it out")
    if hidden.numel() == 0:
        return hidden.sum(dtype=torch.promote_types(hidden.dtype, torch.float32))
    group = None if gather == "world" else gather
    return _dispersive_loss(hidden.reshape(hidden.shape[0], -1), temperature, group, gather is not None)


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
        TypeError: tensors that are not floating point, a mask that is not bool.
        RuntimeError: a backend that was asked for and cannot run; double backward.

    Source: VideoREPA (arXiv:2505.23656) and VA-VAE, with their published code; U-REPA; SARA.
    """
    _check_gram(student, teacher, margin, kind, mask)
    if reduction not in ("mean", "none"):
        raise ValueError(f"gram_alignment_loss: unknown reduction={reduction!r}; expected 'mean' or 'none'")
    if not eps > 0:
        raise ValueError(f"gram_alignment_loss: eps must be positive, got {eps}")
    if mask is not None:
        mask = mask.expand(student.shape[:-1])
    dtype = student.dtype if teacher.dtype != torch.float64 else torch.float64
    name = _dispatch.resolve(backend, student.device.type, dtype)
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
        _check_tokens("gram_alignment_loss", name, tensor)
        if tensor.dim() < 2:
            raise ValueError(f"gram_alignment_loss: {name} must be (..., N, D), got {tuple(tensor.shape)}")
    _check_devices("gram_alignment_loss", student, teacher)
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
    if mask.dtype != torch.bool:
        raise TypeError(f"gram_alignment_loss: mask must be bool (True counts), got {mask.dtype}")
    if mask.device != student.device:
        raise ValueError(f"gram_alignment_loss: mask is on {mask.device}, student and teacher on {student.device}")
    leading = student.shape[:-1]
    fits = zip(reversed(mask.shape), reversed(leading), strict=False)
    if mask.dim() > len(leading) or not all(m in (1, n) for m, n in fits):
        raise ValueError(
            f"gram_alignment_loss: mask of shape {tuple(mask.shape)} does not broadcast to the tokens {tuple(leading)}"
        )


class Tap(NamedTuple):
    """What a student block hands to its teacher, so that their alignment costs no pass over memory of its own.

    Attributes:
        hidden: (..., D), the student's tokens. Detached where `slot` is there: the gradient goes another way.
        slot, factors: that way; empty where the gradient goes through `hidden`. They serve one teacher.
    """

    hidden: Tensor
    slot: Tensor
    factors: Tensor


class Seam(NamedTuple):
    """The results of `aligned_residual_norm`.

    Attributes:
        residual: (..., D), x + gate·branch.
        normed: (..., D), modulated norm of it.
        cosine: (...) fp32, cos(student, residual) per token, differentiable in the student; or None.
        tap: for the teacher, or None.
    """

    residual: Tensor
    normed: Tensor
    cosine: Tensor | None
    tap: Tap | None


def modulated_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    r"""adaLN: LayerNorm(x)·(1 + scale) + shift, in one pass forward and one backward.

    Args:
        x: (..., D) tokens, usually (B, N, D); float32, bfloat16 or float16 (float64 through the reference).
        shift: modulation: (B, D), one row per sample (the first dimension of x); (D,), one for all; or as many
            dimensions as x, each equal to x's or 1: (B, 1, D), per token (B, N, D). Per sample and per token cost no
            copy; what broadcasts over leading dimensions, as (1, N, D), is expanded first.
        scale: likewise.
        eps: added to the variance.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        Like x. Its dtype is what PyTorch's promotion of x, shift and scale gives, so bf16 x with fp32 modulation gives
        fp32; under autocast it is the autocast dtype, rounded once: there eager PyTorch gives fp32, which the next
        linear layer rounds.

    Raises:
        ValueError: shapes that do not fit, tensors on several devices.
        TypeError: tensors that are not floating point.
        RuntimeError: a backend that was asked for and cannot run; double backward.

    Source: DiT (Peebles and Xie 2022, arXiv:2212.09748), adaLN. Mean and variance are fp32; a NaN or infinity stays in
    its token.
    """
    return _seam("modulated_layer_norm", x, None, None, shift, scale, norm="layer", eps=eps, backend=backend).normed


def modulated_rms_norm(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """RMSNorm(x)·(1 + scale) + shift, x / sqrt(mean(x²) + eps) being RMSNorm without weight.

    A weight w folds into the modulation: scale' = w·(1 + scale) - 1. Arguments, results and errors are those of
    `modulated_layer_norm`; None stands for zeros.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467; LightningDiT (Yao et al. 2025, arXiv:2501.01423).
    """
    return _seam("modulated_rms_norm", x, None, None, shift, scale, norm="rms", eps=eps, backend=backend).normed


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """X + gate·branch, the end of a half-block, in one pass; its backward reads and writes two tensors each.

    Args:
        x: (..., D) residual stream.
        branch: (..., D), what attention or MLP returned.
        gate: modulation, as `modulated_layer_norm` takes it.
        backend: as there.

    Returns:
        Like x, of the dtype that PyTorch's promotion gives. Errors as `modulated_layer_norm`.
    """
    return _seam("gated_residual", x, branch, gate, None, None, norm=None, eps=1e-6, backend=backend).residual


def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float = 1e-6,
    norm: str = "layer",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The end of one half-block and the start of the next in one pass.

    residual = x + gate·branch, normed = norm(residual)·(1 + scale) + shift. Forward moves four (M, D) tensors, backward
    six and the sums for the modulation.

    Args:
        x: (..., D) residual stream.
        branch: (..., D), what attention or MLP returned.
        gate: modulation, as `modulated_layer_norm` takes it.
        shift: modulation, or None for zeros.
        scale: modulation, or None for zeros.
        eps: added to the variance or the mean square.
        norm: "layer" (LayerNorm without weights) or "rms".
        backend: as in `modulated_layer_norm`.

    Returns:
        (residual, normed). The residual has the dtype of PyTorch's promotion of x, branch and gate; for `normed` see
        `modulated_layer_norm`. Errors as there.
    """
    seam = _seam("gated_residual_norm", x, branch, gate, shift, scale, norm=norm, eps=eps, backend=backend)
    return seam.residual, seam.normed


def aligned_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    student: Tap | None = None,
    tap: bool = False,
    eps: float = 1e-6,
    norm: str = "layer",
    align_eps: float = 1e-6,
    backend: str = "auto",
) -> Seam:
    """`gated_residual_norm` with an alignment riding along: the residual is a student, a teacher, or both.

    At the student block ask for a `tap`; give it to the call at the teacher block as `student`. The cosine of the two
    residuals comes out there, for one read of the student; its gradient enters the student's backward pass for one read
    of the teacher. The teacher is a constant (stop-gradient), as in LayerSync.

    Args:
        x: as in `gated_residual_norm`.
        branch: likewise.
        gate: likewise.
        shift: likewise.
        scale: likewise.
        student: the tap of a shallower block, from the same backend. A tap serves one call; a second one makes the
            student's gradient NaN.
        tap: whether this residual is a student.
        eps: as in `gated_residual_norm`.
        norm: likewise.
        align_eps: a token whose norm is below it has cosine 0 and gradient 0.
        backend: as in `gated_residual_norm`.

    Returns:
        A Seam. Its cosine equals `-layersync_loss(student, residual, reduction="none")`.

    Raises:
        ValueError: as `gated_residual_norm`; a student of another shape; a tap from another backend.
    """
    return _seam(
        "aligned_residual_norm", x, branch, gate, shift, scale, norm=norm, eps=eps, backend=backend,
        student=student, tap=tap, align_eps=align_eps,
    )  # fmt: skip


def _seam(
    op: str,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    norm: str | None,
    eps: float,
    backend: str,
    student: Tap | None = None,
    tap: bool = False,
    align_eps: float = 1e-6,
) -> Seam:
    _check_tokens(op, "x", x)
    if branch is not None:
        _check_tokens(op, "branch", branch, x)
        if branch.shape != x.shape:
            raise ValueError(f"{op}: branch {tuple(branch.shape)} must have the shape of x, {tuple(x.shape)}")
    if student is not None:
        _check_tokens(op, "student", student.hidden, x)
        if student.hidden.shape != x.shape:
            raise ValueError(
                f"{op}: the student's hidden {tuple(student.hidden.shape)} must have the shape of x, {tuple(x.shape)}"
            )
    if norm not in ("layer", "rms", None):
        raise ValueError(f"{op}: unknown norm={norm!r}; expected 'layer' or 'rms'")
    for label, value in (("eps", eps), ("align_eps", align_eps)):
        if not value > 0:
            raise ValueError(f"{op}: {label} must be positive, got {value}")
    modulations = {name: m for name, m in (("gate", gate), ("shift", shift), ("scale", scale)) if m is not None}
    for name, m in modulations.items():
        _check_tokens(op, name, m, x)
    promote = torch.promote_types
    stream = x.dtype
    if branch is not None:
        stream = functools.reduce(promote, [branch.dtype, *([] if gate is None else [gate.dtype])], stream)
    affine = [m.dtype for m in (shift, scale) if m is not None]
    out = functools.reduce(promote, affine, stream)
    if norm is not None and torch.is_autocast_enabled(x.device.type) and out != torch.float64:
        out = torch.get_autocast_dtype(x.device.type)
    name = _dispatch.resolve(backend, x.device.type, promote(out, stream))
    if name == "reference" or x.numel() == 0:
        modulations = {name: _as_modulation(op, name, m, x) for name, m in modulations.items()}
        return _reference_seam(
            op, x.to(stream), branch, modulations, student, tap, norm=norm, eps=eps, align_eps=align_eps, dtype=out
        )

    # The kernels take (stream, half-block) dtypes that are equal, or fp32 with anything; the rest is widened to fp32.
    half = out if branch is None else branch.dtype if norm is None else promote(branch.dtype, out)
    wide = stream if stream in (half, torch.float32) else torch.float32
    if wide != stream and norm is None:
        half = wide
    per_sample = (x.shape[0], x.shape[-1])
    groups = modulations
    if any(m.shape != per_sample for m in groups.values()):
        full = [as_groups(_as_modulation(op, key, m, x), x.shape[:-1]) for key, m in groups.items()]
        groups = dict(zip(groups, in_equal_groups(full), strict=True))
    kinds = {m.dtype for m in groups.values()}
    if kinds - {half} and kinds != {torch.float32}:
        groups = {key: m.to(torch.float32) for key, m in groups.items()}
    if student is not None and student.slot.numel() == 0:
        raise ValueError(f"{op}: the student's tap comes from the reference; this call runs on {name}")
    taken = None if student is None else (student.hidden.to(wide), student.slot, student.factors)
    residual, normed, cosine, link = _gated_residual_norm(
        x.to(wide), None if branch is None else branch.to(half), groups.get("gate"), groups.get("shift"),
        groups.get("scale"), taken, tap=tap, norm=norm is not None, rms=norm == "rms", eps=eps, align_eps=align_eps,
        dtype=half, backend=name,
    )  # fmt: skip
    residual, normed = residual.to(stream), normed.to(out)
    return Seam(residual, normed, None if student is None else cosine, Tap(residual.detach(), *link) if tap else None)


def _reference_seam(
    op: str,
    x: Tensor,
    branch: Tensor | None,
    modulations: dict[str, Tensor],
    student: Tap | None,
    tap: bool,
    *,
    norm: str | None,
    eps: float,
    align_eps: float,
    dtype: torch.dtype,
) -> Seam:
    if student is not None and student.slot.numel() > 0:
        raise ValueError(f"{op}: the student's tap comes from a fused backend; this call runs on the reference")
    residual, normed, cosine = gated_residual_norm_reference(
        x, branch, modulations.get("gate"), modulations.get("shift"), modulations.get("scale"),
        None if student is None else student.hidden, norm=norm is not None, rms=norm == "rms", eps=eps,
        align_eps=align_eps, dtype=dtype,
    )  # fmt: skip
    empty = x.new_empty((0,))
    return Seam(residual, empty if normed is None else normed, cosine, Tap(residual, empty, empty) if tap else None)


def _check_tokens(op: str, name: str, tensor: Tensor, like: Tensor | None = None, other: str = "x") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor (..., D), got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} needs a channel dimension (..., D), got a 0-d tensor")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device} and {other} on {like.device}; move one of them")


def _as_modulation(op: str, name: str, modulation: Tensor, x: Tensor) -> Tensor:
    """Give a modulation as many dimensions as x has, each equal to x's or 1, the last one D."""
    *leading, width = x.shape
    dims: list[int] | None = None
    if modulation.shape[-1] == width:
        given = list(modulation.shape[:-1])
        if len(given) == len(leading):
            dims = given
        elif len(given) <= 1:  # one row for all, or one per sample: the first dimension
            dims = [*given, *[1] * (len(leading) - len(given))]
    if dims is None or any(d not in (1, n) for d, n in zip(dims, leading, strict=True)):
        ones = ", ".join("1" * (len(leading) - 1))
        expected = [f"({width},)"]
        if leading:
            expected += [f"({leading[0]}, {width})", f"({leading[0]}, {ones + ', ' if ones else ''}{width})"]
        raise ValueError(
            f"{op}: {name} of shape {tuple(modulation.shape)} does not fit x {tuple(x.shape)}; expected "
            f"{', '.join(dict.fromkeys(expected))} or one value per token, {tuple(x.shape)}"
        )
    return modulation.reshape(*dims, width)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """gelu_tanh(x·Wᵀ + b): the library's GEMM with the activation in one pass behind it.

    Backward fuses the derivative of GELU with the sum over tokens for the bias. Saves x, W and the pre-activation.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,) or None.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        (..., O), of the dtype of the inputs; under autocast of the autocast dtype, as `F.linear`.

    Raises:
        ValueError: shapes that do not fit, tensors on several devices.
        TypeError: dtypes that differ (outside autocast) or are not floating point.
        RuntimeError: a backend that was asked for and cannot run; double backward.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, tanh form.
    """
    x, (weight,), (bias,), name = _linear_inputs("linear_gelu", x, (weight,), (bias,), backend)
    if name == "reference" or x.numel() == 0:
        return linear_gelu_reference(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _linear_gelu(rows, weight, bias, name).view(*x.shape[:-1], weight.shape[0])


def gelu_mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Linear, tanh-GELU, linear: the MLP of a DiT block, which keeps its pre-activation but not its activation.

    Backward computes the activation again in the pass that multiplies by the derivative of GELU: (M, H) less memory for
    one more write, where H is the inner width. Arguments, results and errors as `linear_gelu`.

    Args:
        x: (..., I).
        weight1: (H, I).
        bias1: (H,) or None.
        weight2: (O, H).
        bias2: (O,) or None.
        backend: as `linear_gelu`.

    Returns:
        (..., O).
    """
    x, (weight1, weight2), (bias1, bias2), name = _linear_inputs(
        "gelu_mlp", x, (weight1, weight2), (bias1, bias2), backend
    )
    if name == "reference" or x.numel() == 0:
        return gelu_mlp_reference(x, weight1, bias1, weight2, bias2)
    rows = x.reshape(-1, x.shape[-1])
    return _gelu_mlp(rows, weight1, bias1, weight2, bias2, name).view(*x.shape[:-1], weight2.shape[0])


def _linear_inputs(
    op: str,
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    backend: str,
    name: str = "x",
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...], str]:
    """Check the inputs of a chain of linear layers and cast them as autocast does. `name` is what x is called."""
    _check_tokens(op, name, x)
    width = x.shape[-1]
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        suffix = "" if len(weights) == 1 else str(number)
        _check_tokens(op, f"weight{suffix}", weight, x, name)
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(
                f"{op}: weight{suffix} {tuple(weight.shape)} must have the shape (out, {width}): "
                f"its input has {width} channels"
            )
        width = weight.shape[0]
        if bias is not None:
            _check_tokens(op, f"bias{suffix}", bias, x, name)
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
    return x, weights, biases, _dispatch.resolve(backend, device, x.dtype)


def spatial_norm(x: Tensor, *, alpha: float = 1.0, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """Takes from a teacher what the tokens of a sample share, channel by channel: its z-score over the tokens.

    (x - alpha·mean) / (std + eps), with mean and unbiased standard deviation over the tokens of each sample, in fp32
    and free of cancellation. One read and one write of x.

    Args:
        x: (..., N, D) tokens of a teacher, usually (B, N, D); float32, bfloat16 or float16, and float64 through the
            reference. It counts as a constant: where a gradient is asked for, the reference runs. The last dimension
            should be contiguous, samples and tokens may have any stride (tokens behind a class token cost no copy).
        alpha: how much of the mean goes.
        eps: added to the standard deviation; at least 1e-12.
        backend: "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        Like x, rounded once. Where all tokens are equal, (1 - alpha)·x / eps. A NaN or infinity makes a NaN of its
        channel in its sample.

    Raises:
        ValueError: a single token, which has no standard deviation; eps below 1e-12.
        TypeError: a tensor that is not floating point.
        RuntimeError: a backend that was asked for and cannot run.

    Source: iREPA (Singh et al. 2025, arXiv:2512.10794), its spatial normalisation.
    """
    _check_tokens("spatial_norm", "x", x)
    if x.dim() < 2:
        raise ValueError(f"spatial_norm: x must have the shape (..., N, D), got {tuple(x.shape)}")
    if x.shape[-2] == 1:
        raise ValueError(
            f"spatial_norm: one token has no standard deviation, got x {tuple(x.shape)}; "
            "expected (..., N, D) with N > 1. Leave the normalisation out for pooled features"
        )
    if not eps >= 1e-12:
        raise ValueError(f"spatial_norm: eps must be at least 1e-12, got {eps}")
    name = _dispatch.resolve(backend, x.device.type, x.dtype)
    if x.numel() == 0:
        return x.clone()
    samples = x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])
    if name == "reference" or (x.requires_grad and torch.is_grad_enabled()):
        result = spatial_norm_reference(samples, alpha, eps)
    else:
        result = _spatial_norm(samples, alpha, eps, name)
    return result if x.dim() == 3 else result.reshape(x.shape)
