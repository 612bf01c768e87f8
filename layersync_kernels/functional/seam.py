"""The seam between two half-blocks: gate, residual, norm, modulation, and an alignment riding along."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import compiled, dispatch
from ..ops.gated_residual_norm import gated_residual_norm as _gated_residual_norm
from ..ops.gated_residual_norm import gated_residual_norm_reference
from ..ops.gated_residual_norm.op import as_groups, in_equal_groups
from .checks import autocast_dtype, check_positive, check_tokens, check_vector


class Tap(NamedTuple):
    """What a student block hands to its teacher, so that their alignment costs no pass over memory of its own.

    The gradient of a student's token is p·teacher + q·student. A fused backend sends it back unmultiplied, through two
    inlets that have no values forward: the teacher's tokens into the slot, by reference, p and q into the factors. The
    student's backward pass multiplies them. One teacher may do so: a second makes the gradient NaN.

    Attributes:
        hidden: (..., D), the student's tokens. Detached by a fused backend, differentiated by the reference.
        slot: the inlet for the teacher's tokens, (..., D) without memory of its own; empty from the reference.
        factors: the inlet for p, q and the number of teachers, (3, tokens) fp32; empty from the reference.
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
        scale: modulation, of the shapes that shift may have, but not necessarily of the same.
        eps: added to the variance.
        backend: "auto", "reference", "cpp", "triton", "cuda" or "compile" (the reference under torch.compile).

    Returns:
        Like x. Its dtype is what PyTorch's promotion of x, shift and scale gives, so bf16 x with fp32 modulation gives
        fp32; under autocast it is the autocast dtype, rounded once: there eager PyTorch gives fp32, which the next
        linear layer rounds.

    Raises:
        ValueError: shapes that do not fit, tensors on several devices.
        TypeError: tensors that are not dense or not floating point.
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


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor, *, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """X + gate·branch, the end of a half-block, in one pass; its backward reads and writes two tensors each.

    Args:
        x: (..., D) residual stream.
        branch: (..., D), what attention or MLP returned.
        gate: modulation, as `modulated_layer_norm` takes it.
        bias: (D,), of any floating dtype: what the layer that returned the branch has added to it already.
            It changes no value: its gradient is that of the branch summed over tokens, which comes with the same pass.
            Give it detached to that layer, or it counts twice.
        backend: "auto", "reference", "cpp", "triton", "cuda" or "compile" (the reference under torch.compile).

    Returns:
        Like x, of the dtype that PyTorch's promotion gives. Errors as `modulated_layer_norm`, and for a bias that does
        not fit.
    """
    return _seam(
        "gated_residual", x, branch, gate, None, None, bias=bias, norm=None, eps=1e-6, backend=backend
    ).residual


def gated_residual_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "layer",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The end of one half-block and the start of the next in one pass.

    residual = x + gate·branch, normed = norm(residual)·(1 + scale) + shift. Forward moves four (M, D) tensors, backward
    six and the sums for the modulation.

    Args:
        x: (..., D) residual stream.
        branch: (..., D), what attention or MLP returned. None, with the gate, where a stream begins: the residual is x,
            and backward adds the gradients of both results in one pass.
        gate: modulation, as `modulated_layer_norm` takes it; None for ones.
        shift: modulation, or None for zeros.
        scale: modulation, or None for zeros.
        bias: as `gated_residual` takes it.
        eps: added to the variance or the mean square.
        norm: "layer" (LayerNorm without weights) or "rms".
        backend: "auto", "reference", "cpp", "triton", "cuda" or "compile" (the reference under torch.compile).

    Returns:
        (residual, normed). The residual has the dtype of PyTorch's promotion of x, branch and gate; for `normed` see
        `modulated_layer_norm`. Errors as there.
    """
    seam = _seam(
        "gated_residual_norm", x, branch, gate, shift, scale, bias=bias, norm=norm, eps=eps, backend=backend,
        carry=branch is None,
    )  # fmt: skip
    return seam.residual, seam.normed


def aligned_residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    bias: Tensor | None = None,
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
        x: (..., D) residual stream.
        branch: (..., D), what attention or MLP returned.
        gate: modulation, as `modulated_layer_norm` takes it.
        shift: modulation, or None for zeros.
        scale: modulation, or None for zeros.
        bias: as `gated_residual` takes it.
        student: the tap of a shallower block, from the same backend. A tap serves one call; a second one makes the
            student's gradient NaN.
        tap: whether this residual is a student.
        eps: added to the variance or the mean square.
        norm: "layer" (LayerNorm without weights) or "rms".
        align_eps: a token whose norm is below it has cosine 0 and gradient 0.
        backend: "auto", "reference", "cpp", "triton", "cuda" or "compile" (the reference under torch.compile).

    Returns:
        A Seam. Its cosine equals `-layersync_loss(student, residual, reduction="none")`.

    Raises:
        ValueError: as `gated_residual_norm`; a student of another shape; a tap from another backend.
        TypeError: tensors that are not dense or not floating point; a student that is no `Tap`.
    """
    return _seam(
        "aligned_residual_norm", x, branch, gate, shift, scale, bias=bias, norm=norm, eps=eps, backend=backend,
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
    bias: Tensor | None = None,
    carry: bool = False,
    student: Tap | None = None,
    tap: bool = False,
    align_eps: float = 1e-6,
) -> Seam:
    modulations = {name: m for name, m in (("gate", gate), ("shift", shift), ("scale", scale)) if m is not None}
    _check_seam(op, x, branch, modulations, student, norm=norm, eps=eps, align_eps=align_eps)
    if branch is None and (gate is not None or bias is not None):
        raise ValueError(f"{op}: a {'bias' if gate is None else 'gate'} without a branch; give it, or neither")
    if branch is not None and bias is not None:
        check_vector(op, "bias", bias, "branch", branch, x.shape[-1:], "the bias of the layer that made the branch")
    dtypes = seam_dtypes(x, branch, modulations, norm=norm)
    widest = torch.promote_types(dtypes.stream, dtypes.normed)
    name = dispatch.resolve(op, backend, x.device.type, widest, tokens=x)
    if name in dispatch.PLAIN or x.numel() == 0:
        return _plain_seam(
            op, x, branch, modulations, student, tap, bias, norm=norm, eps=eps, align_eps=align_eps, dtypes=dtypes,
            backend=name,
        )  # fmt: skip
    if student is not None and student.slot.numel() == 0:
        raise ValueError(f"{op}: the student's tap comes from the reference; this call runs on {name}")
    groups = _kernel_modulations(op, x, modulations, dtypes)
    residual, normed, cosine, link = _gated_residual_norm(
        x.to(dtypes.wide), None if branch is None else branch.to(dtypes.half), groups.get("gate"), groups.get("shift"),
        groups.get("scale"), None if student is None else student._replace(hidden=student.hidden.to(dtypes.wide)),
        bias, carry=carry, tap=tap, norm=norm is not None, rms=norm == "rms", eps=eps, align_eps=align_eps,
        dtype=dtypes.half, backend=name,
    )  # fmt: skip
    residual, normed = residual.to(dtypes.stream), normed.to(dtypes.normed)
    return Seam(residual, normed, None if student is None else cosine, Tap(residual.detach(), *link) if tap else None)


class SeamDtypes(NamedTuple):
    """The dtypes of a seam: what its results have, and what the kernels work in.

    The kernels take a stream and a half-block of equal dtype, or a stream of fp32 with any half-block. What is neither
    is widened to fp32.

    Attributes:
        stream: of the residual that is returned.
        normed: of the norm that is returned.
        wide: in which the kernels read x and the student, and write the residual.
        half: in which the kernels read the branch and write the norm.
    """

    stream: torch.dtype
    normed: torch.dtype
    wide: torch.dtype
    half: torch.dtype


def seam_dtypes(x: Tensor, branch: Tensor | None, modulations: dict[str, Tensor], *, norm: str | None) -> SeamDtypes:
    """The dtypes of a seam, from those of its inputs and autocast.

    Args:
        x: the residual stream.
        branch: what is added to it, or None.
        modulations: "gate", "shift" and "scale", as far as they are given.
        norm: "layer", "rms", or None for a seam that ends with the residual.
    """
    stream = x.dtype
    for added in (branch, modulations.get("gate")):
        stream = stream if added is None else torch.promote_types(stream, added.dtype)
    normed = stream
    for affine in (modulations.get("shift"), modulations.get("scale")):
        normed = normed if affine is None else torch.promote_types(normed, affine.dtype)
    autocast = autocast_dtype(x.device.type)
    if norm is not None and autocast is not None and normed != torch.float64:
        normed = autocast
    if branch is None:  # the half-block is the norm alone
        half = normed
    elif norm is None:  # it is the branch alone
        half = branch.dtype
    else:
        half = torch.promote_types(branch.dtype, normed)
    wide = stream if stream in (half, torch.float32) else torch.float32
    if norm is None and wide != stream:  # with no norm to write, the branch is widened too
        half = wide
    return SeamDtypes(stream, normed, wide, half)


def _check_seam(
    op: str,
    x: Tensor,
    branch: Tensor | None,
    modulations: dict[str, Tensor],
    student: Tap | None,
    *,
    norm: str | None,
    eps: float,
    align_eps: float,
) -> None:
    check_tokens(op, "x", x)
    if branch is not None:
        check_tokens(op, "branch", branch, x)
        if branch.shape != x.shape:
            raise ValueError(f"{op}: branch {tuple(branch.shape)} must have the shape of x, {tuple(x.shape)}")
    if student is not None:
        if not isinstance(student, Tap):
            raise TypeError(
                f"{op}: student must be a Tap, as a call with tap=True gives it, got {type(student).__name__}"
            )
        check_tokens(op, "student.hidden", student.hidden, x)
        if student.hidden.shape != x.shape:
            raise ValueError(
                f"{op}: the student's hidden {tuple(student.hidden.shape)} must have the shape of x, {tuple(x.shape)}"
            )
    if norm not in ("layer", "rms", None):
        raise ValueError(f"{op}: unknown norm={norm!r}; expected 'layer' or 'rms'")
    check_positive(op, "eps", eps)
    check_positive(op, "align_eps", align_eps)
    for name, modulation in modulations.items():
        check_tokens(op, name, modulation, x)


def _kernel_modulations(op: str, x: Tensor, modulations: dict[str, Tensor], dtypes: SeamDtypes) -> dict[str, Tensor]:
    """The modulations as the kernels read them: equally many groups of rows each, of one dtype, fp32 or the half's."""
    groups = modulations
    per_sample = (x.shape[0], x.shape[-1])
    if any(m.shape != per_sample for m in groups.values()):
        full = [as_groups(_as_modulation(op, name, m, x), x.shape[:-1]) for name, m in groups.items()]
        groups = dict(zip(groups, in_equal_groups(full), strict=True))
    kinds = {m.dtype for m in groups.values()}
    if kinds <= {dtypes.half} or kinds == {torch.float32}:
        return groups
    return {name: m.to(torch.float32) for name, m in groups.items()}


def _plain_seam(
    op: str,
    x: Tensor,
    branch: Tensor | None,
    modulations: dict[str, Tensor],
    student: Tap | None,
    tap: bool,
    bias: Tensor | None,
    *,
    norm: str | None,
    eps: float,
    align_eps: float,
    dtypes: SeamDtypes,
    backend: str,
) -> Seam:
    modulations = {name: _as_modulation(op, name, m, x) for name, m in modulations.items()}
    if student is not None and student.slot.numel() > 0:
        raise ValueError(f"{op}: the student's tap comes from a fused backend; this call runs on the reference")
    reference = compiled.plain(op, backend, gated_residual_norm_reference, x.shape[-1])
    residual, normed, cosine = reference(
        x.to(dtypes.stream), branch, modulations.get("gate"), modulations.get("shift"), modulations.get("scale"),
        None if student is None else student.hidden, norm=norm is not None, rms=norm == "rms", eps=eps,
        align_eps=align_eps, dtype=dtypes.normed, bias=bias,
    )  # fmt: skip
    empty = x.new_empty((0,))
    return Seam(residual, empty if normed is None else normed, cosine, Tap(residual, empty, empty) if tap else None)


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
