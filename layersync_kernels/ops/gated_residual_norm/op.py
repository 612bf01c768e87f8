"""gated_residual_norm: r = x + gate·branch, y = norm(r)·(1 + scale) + shift, and at a teacher block cos(student, r).

Story of the op: the end of one half-block and the start of the next in one pass. Forward reads x and branch and writes
r and y (4 MD) and keeps 8 bytes a row (mean and 1/σ). Backward reads the gradients of r and y, r and branch, and writes
those of x and branch (6 MD), with the sums over rows for gate, shift and scale as ordered partials:

    a   = dy·(1 + scale)                       x̂ = (r − mean)/σ
    dr += (a − mean(a) − x̂·mean(a·x̂))/σ       dx = dr, dbranch = gate·dr
    dgate = Σ branch·dr, dshift = Σ dy, dscale = Σ x̂·dy      over the rows of a group

The layer that made the branch has a bias, whose gradient is Σ gate·dr: gate·Σ dr over a group, and the sum of those.

Any part can be left out: without branch it is a modulated norm (2 and 3 MD), without norm the end of a block.

An alignment rides along. Its gradient for a student row s with teacher t is a combination of both rows,

    ds = p·t + q·s,    p = g/(‖s‖‖t‖),  q = −g·c/‖s‖²,

so it travels in this factored form, and no (M, D) gradient is written, read back and added: the student's op hands out
a `slot` shaped like r, whose "gradient" is the teacher itself, and `factors` (3, M), whose gradient is (p, q, 1). The
student's backward pass adds p·t + q·r to the gradient that it reads anyway. A slot therefore serves one pair: autograd
would add up what two teachers send. A third row of `factors` counts them, and two of them give NaN, not a wrong number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import raw_op
from ..autograd import FusedFunction, differentiable_once
from ..registry import Op, register
from .reference import gated_residual_norm_reference

register(
    Op(
        "gated_residual_norm",
        (
            "gated_residual_norm",
            "gated_residual",
            "modulated_layer_norm",
            "modulated_rms_norm",
            "aligned_residual_norm",
        ),
        gated_residual_norm_reference,
        uncompiled=None,
    )
)


_ROWS_OF_A_SUM = 8
"""Rows of a group from which on the sums for a bias, 4 bytes a channel and group, ride along for next to nothing."""


def as_groups(modulation: Tensor, leading: Sequence[int]) -> Tensor:
    """View a modulation that broadcasts over (*leading, D) as (G, D), or expand it to one row per token.

    Args:
        modulation: (*dims, D), one dimension for each of `leading`, equal to it or 1.
        leading: the dimensions of the tokens.
    """
    *dims, width = modulation.shape
    shared = len(dims)  # dimensions from here on share a row
    while shared > 0 and dims[shared - 1] == 1:
        shared -= 1
    if tuple(dims[:shared]) == tuple(leading[:shared]):
        return modulation.reshape(math.prod(dims), width)
    return modulation.expand(*leading, width).reshape(math.prod(leading), width)


def in_equal_groups(modulations: Sequence[Tensor]) -> list[Tensor]:
    """Repeat the rows of (G, D) modulations up to the finest division among them."""
    groups = max(m.shape[0] for m in modulations)
    return [
        m if m.shape[0] == groups else m.unsqueeze(1).expand(-1, groups // m.shape[0], -1).flatten(0, 1)
        for m in modulations
    ]


def _fake_forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    student: Tensor | None,
    norm: bool,
    rms: bool,
    eps: float,
    align_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return (
        x.new_empty((0,) if branch is None else x.shape),
        x.new_empty(x.shape if norm else (0,), dtype=dtype),
        x.new_empty((2, rows) if norm else (0,), dtype=torch.float32),
        x.new_empty((0,) if student is None else (3, rows), dtype=torch.float32),
    )


def _fake_backward(
    d_residual: Tensor | None,
    d_normed: Tensor | None,
    residual: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    stats: Tensor | None,
    other: Tensor | None,
    factors: Tensor | None,
    rms: bool,
    groups: int,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = (groups, residual.shape[-1])

    def empty(wanted: bool) -> Tensor:
        return residual.new_empty(sums if wanted else (0,), dtype=torch.float32)

    affine = groups > 0 and d_normed is not None
    moved = d_normed is not None or other is not None
    return (
        residual.new_empty(residual.shape if moved else (0,)),
        (residual if d_normed is None else d_normed).new_empty((0,))
        if branch is None
        else branch.new_empty(branch.shape),
        empty(groups > 0 and gate is not None),
        empty(affine),
        empty(affine),
        empty(bias),
    )


# x: (..., D) with D > 0; branch and student, if given, of the same shape; student has x's dtype, branch has `dtype`
# where a norm is wanted. x's dtype is `dtype` or float32. gate, shift, scale: (G, D), rows of any stride, all of one
# dtype, float32 or `dtype`; each serves M/G rows in a row. align_eps: see cosine_alignment. Returns, contiguous:
#   residual: like x, or (0,) without branch.
#   normed: (..., D) of `dtype`, or (0,) without norm.
#   stats: (2, M) float32, mean (0 where rms) and 1/sqrt(variance + eps), or (0,).
#   alignment: (3, M) float32, cosine and both reciprocal norms (student, residual) as in cosine_alignment, or (0,).
FORWARD = raw_op.declare("gated_residual_norm_forward", _fake_forward, kind="rows", python={"triton": "triton:forward"})
# Gradients of the two outputs as far as there are any, at any stride: d_residual has residual's dtype; d_normed that of
# branch where there is one. residual: the forward's, or x without branch. other (..., D) of residual's dtype and
# factors (2, M) float32: factors[0]·other + factors[1]·residual is added to the gradient of the residual. groups: G, or
# 0 where no gradient of gate, shift or scale is wanted. bias: whether the sums of d_branch are wanted, for which groups
# must be above 0. Returns, contiguous:
#   d_x: like residual; or (0,) where it equals d_residual, which is without d_normed and other.
#   d_branch: like branch, or (0,) without branch.
#   d_gate, d_shift, d_scale: (G, D) float32, or (0,): d_gate without gate, the other two without d_normed.
#   d_bias: (G, D) float32, the sum over the rows of each group of d_branch as it is before it is rounded, or (0,).
BACKWARD = raw_op.declare(
    "gated_residual_norm_backward",
    _fake_backward,
    kind="rows",
    python={"triton": "triton:backward"},
    symbolic=("groups",),
)


class Inputs(NamedTuple):
    """What `GatedResidualNorm` takes, and in the same places which of it wants a gradient, and the gradients."""

    x: Any
    branch: Any
    gate: Any
    shift: Any
    scale: Any
    student: Any = None
    student_slot: Any = None
    student_factors: Any = None
    bias: Any = None
    carry: Any = None
    tap: Any = None
    norm: Any = None
    rms: Any = None
    eps: Any = None
    align_eps: Any = None
    dtype: Any = None
    backend: Any = None


class Results(NamedTuple):
    """What `GatedResidualNorm` gives: the results of the raw op, the cosine (...), and the two halves of a tap."""

    residual: Tensor
    normed: Tensor
    stats: Tensor
    alignment: Tensor
    cosine: Tensor
    slot: Tensor
    factors: Tensor


class GatedResidualNorm(FusedFunction):
    """The fused op with its gradient. Saves r, branch, gate, scale and 8 bytes a row; at a teacher block 12 more."""

    @staticmethod
    def forward(
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        student: Tensor | None,
        student_slot: Tensor | None,
        student_factors: Tensor | None,
        bias: Tensor | None,
        carry: bool,
        tap: bool,
        norm: bool,
        rms: bool,
        eps: float,
        align_eps: float,
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, ...]:
        """See `Results`."""
        residual, normed, stats, alignment = FORWARD[backend](
            x, branch, gate, shift, scale, student, norm, rms, eps, align_eps, dtype
        )
        if carry:
            residual = x.view_as(x)
        leading = x.shape[:-1]
        cosine = x.new_empty((0,), dtype=torch.float32) if student is None else alignment[0].clone().view(leading)
        slot = x.new_zeros((1,) * x.dim()).expand(x.shape) if tap else x.new_empty((0,))
        factors = x.new_zeros((3, leading.numel()) if tap else (0,), dtype=torch.float32)
        return residual, normed, stats, alignment, cosine, slot, factors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the backward pass reads."""
        given, made = Inputs(*inputs), Results(*output)
        ctx.mark_non_differentiable(made.stats, made.alignment)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            given.x if given.branch is None else made.residual,
            given.branch,
            given.gate,
            given.scale,
            made.stats if given.norm else None,
            None if given.student is None else made.alignment,
        )
        modulations = [m for m in (given.gate, given.shift, given.scale) if m is not None]
        ctx.groups = modulations[0].shape[0] if modulations else 0
        ctx.carry, ctx.tap, ctx.rms, ctx.backend = given.carry, given.tap, given.rms, given.backend
        ctx.shift_dtype = None if given.shift is None else given.shift.dtype
        ctx.bias_dtype = None if given.bias is None else given.bias.dtype

    @staticmethod
    def backward(
        ctx: Any,
        d_residual: Tensor | None,
        d_normed: Tensor | None,
        _stats: None,
        _alignment: None,
        d_cosine: Tensor | None,
        d_slot: Tensor | None,
        d_factors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, branch, gate, shift, scale, and the student's in factored form."""
        residual, branch, gate, scale, stats, alignment = ctx.saved_tensors
        slot = factors = None
        # Dynamo hands in a gradient for every output, be it one that was not asked for.
        d_residual = None if branch is None and not ctx.carry else d_residual
        d_normed = None if stats is None else d_normed
        d_slot, d_factors = (d_slot, d_factors) if ctx.tap else (None, None)
        if d_cosine is not None and alignment is not None:
            cosine, rnorm_student, rnorm_teacher = alignment.unbind(0)
            g = d_cosine.reshape(-1).to(torch.float32) * rnorm_student
            # Where the cosine was set to 0, so are the reciprocal norms, and the gradient. Of rows near 1e30 it may
            # vanish: it is under 1e-30 there.
            slot = residual.detach()
            factors = torch.stack([g * rnorm_teacher, -g * cosine * rnorm_student, torch.ones_like(g)])
        if d_residual is None and d_normed is None and d_slot is None:
            return tuple(Inputs(None, None, None, None, None, student_slot=slot, student_factors=factors))
        if branch is None and d_normed is None:
            return tuple(Inputs(d_residual, None, None, None, None))
        if d_slot is not None:
            assert d_factors is not None
            d_factors = torch.where(d_factors[2] == 1, d_factors[:2], torch.nan)
        wanted = Inputs(*ctx.needs_input_grad)
        groups = ctx.groups if wanted.gate or wanted.shift or wanted.scale or wanted.bias else 0
        if wanted.bias and groups == 0:
            groups = 1  # there is no modulation that says how many
        # Of short groups there are too many sums.
        rides = wanted.bias and residual.numel() >= _ROWS_OF_A_SUM * groups * residual.shape[-1]
        dx, d_branch, d_gate, d_shift, d_scale, d_biases = BACKWARD[ctx.backend](
            d_residual, d_normed, residual, branch, gate, scale, stats, d_slot, d_factors, ctx.rms, groups, rides
        )
        d_bias = d_biases.sum(dim=0) if rides else None
        if wanted.bias and not rides:
            d_bias = d_branch.flatten(0, -2).sum(dim=0, dtype=torch.float32)
        if d_normed is None and d_slot is None:
            dx = d_residual
        inputs = [x for x in (d_residual, d_normed, residual, branch, gate, scale) if x is not None]

        def give(is_wanted: bool, gradient: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
            if not is_wanted or gradient is None:
                return None
            return differentiable_once(gradient if dtype is None else gradient.to(dtype), *inputs)

        affine = d_normed is not None
        gradients = Inputs(
            give(wanted.x, dx),
            give(wanted.branch, d_branch),
            give(wanted.gate, d_gate, None if gate is None else gate.dtype),
            give(wanted.shift, d_shift if affine else None, ctx.shift_dtype),
            give(wanted.scale, d_scale if affine else None, None if scale is None else scale.dtype),
            student_slot=slot,
            student_factors=factors,
            bias=give(wanted.bias, d_bias, ctx.bias_dtype),
        )
        return tuple(gradients)  # Dynamo loses the gradients of a NamedTuple


def gated_residual_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    student: tuple[Tensor, Tensor, Tensor] | None,
    bias: Tensor | None,
    *,
    carry: bool,
    tap: bool,
    norm: bool,
    rms: bool,
    eps: float,
    align_eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Run the fused op on a resolved backend.

    Arguments as FORWARD's, and the (hidden, slot, factors) of a tap as student; bias (D,) is part of the branch
    already, and gets its gradient, summed over rows. carry, without a branch: the residual is x, and its gradient is
    added to that of the norm in the same pass.

    Returns:
        (residual, normed, cosine, (slot, factors)); those that were not asked for are empty.
    """
    hidden, slot, factors = student if student is not None else (None, None, None)
    given = Inputs(
        x,
        branch,
        gate,
        shift,
        scale,
        hidden,
        slot,
        factors,
        bias,
        carry,
        tap,
        norm,
        rms,
        eps,
        align_eps,
        dtype,
        backend,
    )
    made = Results(*GatedResidualNorm.run(*given))
    return made.residual, made.normed, made.cosine, (made.slot, made.factors)
