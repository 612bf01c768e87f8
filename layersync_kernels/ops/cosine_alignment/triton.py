# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN001, ANN201, ANN202, D103
"""cosine_alignment in Triton: one pass over both tensors forward, one backward, the semantics of csrc/cosine_alignment.

A program takes a tile of rows and walks over their channels, 8 values per thread and step, which are one 16-byte access
in half types: a warp for each row up to 2048 channels, a block for a longer one. Sums over rows are deterministic: one
partial per program, then a second kernel that adds them in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import (
    cosine_of,
    device_of,
    fits,
    layout_names,
    load_tile,
    operand,
    range_factor,
    row_offset,
    smallest_square,
    store_alignment,
    tile_for,
)

_NONE, _MEAN = 0, 1  # as op.REDUCTIONS

_FINISH_BLOCK = 8192  # two steps for the partials of 65,536 rows

# No integer is specialised on, so that neither batch nor tokens recompile; alignment comes with the VECTOR constants.
_FORWARD_INTEGERS = ["rows", *layout_names("st")]
_BACKWARD_INTEGERS = ["rows", *layout_names("gst")]


@triton.jit
def _dots(student, teacher, live, s_factor, t_factor, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    ss = tl.zeros((ROWS, BLOCK), tl.float32)
    tt = tl.zeros((ROWS, BLOCK), tl.float32)
    st = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        s = load_tile(student, live, start, WIDTH, BLOCK).to(tl.float32) * s_factor
        t = load_tile(teacher, live, start, WIDTH, BLOCK).to(tl.float32) * t_factor
        ss += s * s
        tt += t * t
        st += s * t
    return tl.sum(ss, axis=1), tl.sum(tt, axis=1), tl.sum(st, axis=1)


@triton.jit(do_not_specialize=_FORWARD_INTEGERS)
def forward_kernel(
    student,
    teacher,
    weight,  # (rows,) or None for all ones
    stats,  # (3, rows)
    loss,  # (rows,) for reduction none, else None
    partials,  # (2, programs), sums of w·c and of w, else None
    scale,  # set to 1 for reduction none
    rows,
    s_inner,
    s_outer_stride,
    s_inner_stride,
    t_inner,
    t_outer_stride,
    t_inner_stride,
    eps,
    smallest,
    S_VECTOR: tl.constexpr,
    T_VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    live = inside
    w = tl.full((ROWS,), 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + row, mask=inside, other=0.0)
        live = inside & (w != 0)  # a masked row may hold anything and is not read
    student += row_offset(row, rows, s_inner, s_outer_stride, s_inner_stride, S_VECTOR)
    teacher += row_offset(row, rows, t_inner, t_outer_stride, t_inner_stride, T_VECTOR)

    s_factor = tl.full((ROWS,), 1.0, tl.float32)
    t_factor = s_factor
    ss, tt, st = _dots(student, teacher, live, 1.0, 1.0, WIDTH, ROWS, BLOCK)
    again = live & ~(fits(ss, smallest) & fits(tt, smallest))
    if tl.max(again.to(tl.int32), axis=0) > 0:
        s_factor = tl.where(again, range_factor(ss), 1.0)
        t_factor = tl.where(again, range_factor(tt), 1.0)
        ss, tt, st = _dots(student, teacher, live, s_factor[:, None], t_factor[:, None], WIDTH, ROWS, BLOCK)

    cosine, s_rnorm, t_rnorm = cosine_of(ss, tt, st, s_factor, t_factor, eps)
    store_alignment(stats, row, rows, inside, cosine, s_rnorm, t_rnorm)

    term = tl.where(live, w * cosine, 0.0)
    if loss is not None:
        tl.store(loss + row, -term, mask=inside)
        tl.store(scale, 1.0, mask=program == 0)
    else:
        tl.store(partials + program, tl.sum(term, axis=0))
        tl.store(partials + tl.num_programs(0) + program, tl.sum(tl.where(live, w, 0.0), axis=0))


@triton.jit(do_not_specialize=["count"])
def finish_kernel(partials, loss, scale, count, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    terms = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < count:  # not range(): the interpreter of Triton 3.6 cannot count to a tensor beside numpy 2.4
        i = start + tl.arange(0, BLOCK)
        terms += tl.load(partials + i, mask=i < count, other=0.0)
        weights += tl.load(partials + count + i, mask=i < count, other=0.0)
        start += BLOCK
    total = tl.sum(terms, axis=0)
    factor = 1.0
    if MEAN:
        weight = tl.sum(weights, axis=0)
        factor = tl.where(weight == 0, 0.0, tl.div_rn(1.0, tl.where(weight == 0, 1.0, weight)))
    tl.store(scale, factor)
    tl.store(loss, tl.where(total == 0, 0.0, -total * factor))


@triton.jit(do_not_specialize=_BACKWARD_INTEGERS)
def backward_kernel(
    grad,  # of the loss: one value, or one for each row
    student,
    teacher,
    weight,
    stats,
    scale,
    student_grad,  # contiguous rows, or None
    teacher_grad,
    rows,
    g_inner,
    g_outer_stride,
    g_inner_stride,
    s_inner,
    s_outer_stride,
    s_inner_stride,
    t_inner,
    t_outer_stride,
    t_inner_stride,
    S_VECTOR: tl.constexpr,
    T_VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    cosine = tl.load(stats + row, mask=inside, other=0.0)
    s_rnorm = tl.load(stats + rows + row, mask=inside, other=0.0)
    t_rnorm = tl.load(stats + 2 * rows.to(tl.int64) + row, mask=inside, other=0.0)
    factor = -tl.load(grad + row_offset(row, rows, g_inner, g_outer_stride, g_inner_stride, 1), mask=inside, other=0.0)
    factor *= tl.load(scale)
    live = inside & ((s_rnorm != 0) | (t_rnorm != 0))  # else masked, or a row of zeros
    if weight is not None:
        w = tl.load(weight + row, mask=inside, other=0.0)
        factor *= w
    student += row_offset(row, rows, s_inner, s_outer_stride, s_inner_stride, S_VECTOR)
    teacher += row_offset(row, rows, t_inner, t_outer_stride, t_inner_stride, T_VECTOR)

    # The order of the products keeps rows near 1e30 in range, where s_rnorm * t_rnorm would vanish.
    s_away, s_factor = (cosine * s_rnorm)[:, None], (factor * s_rnorm)[:, None]
    t_away, t_factor = (cosine * t_rnorm)[:, None], (factor * t_rnorm)[:, None]
    s_toward, t_toward = t_rnorm[:, None], s_rnorm[:, None]
    # Each step loads what the next one needs, because no load moves up across the stores between them.
    s_next = load_tile(student, live, 0, WIDTH, BLOCK).to(tl.float32)
    t_next = load_tile(teacher, live, 0, WIDTH, BLOCK).to(tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        s, t = s_next, t_next
        if start + BLOCK < WIDTH:
            s_next = load_tile(student, live, start + BLOCK, WIDTH, BLOCK).to(tl.float32)
            t_next = load_tile(teacher, live, start + BLOCK, WIDTH, BLOCK).to(tl.float32)
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (column < WIDTH)
        place = row[:, None] * WIDTH + column
        if student_grad is not None:
            value = tl.where(live[:, None], (t * s_toward - s * s_away) * s_factor, 0.0)
            tl.store(student_grad + place, value, mask=mask)
        if teacher_grad is not None:
            value = tl.where(live[:, None], (s * t_toward - t * t_away) * t_factor, 0.0)
            tl.store(teacher_grad + place, value, mask=mask)


def forward(
    student: Tensor, teacher: Tensor, weight: Tensor | None, eps: float, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward pass; see op.py for arguments and results."""
    s, t = operand(student), operand(teacher)
    width = student.shape[-1]
    rows = student.shape[:-1].numel()
    tile = tile_for(width)
    programs = max(triton.cdiv(rows, tile.rows), 1)
    none = reduction == _NONE
    stats = student.new_empty((3, rows), dtype=torch.float32)
    loss = student.new_empty(student.shape[:-1] if none else (), dtype=torch.float32)
    scale = student.new_empty((), dtype=torch.float32)
    partials = None if none else student.new_empty((2, programs), dtype=torch.float32)
    with device_of(student):
        forward_kernel[(programs,)](
            s.tensor,
            t.tensor,
            weight,
            stats,
            loss if none else None,
            partials,
            scale,
            rows,
            *s.layout,
            *t.layout,
            eps,
            smallest_square(eps),
            S_VECTOR=s.vector,
            T_VECTOR=t.vector,
            WIDTH=width,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
        if not none:
            finish_kernel[(1,)](
                partials, loss, scale, programs, MEAN=reduction == _MEAN, BLOCK=_FINISH_BLOCK, num_warps=16
            )
    return loss, stats, scale


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    scale: Tensor,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward pass; see op.py for arguments and results."""
    d_student = student.new_empty(student.shape if student_grad else (0,))
    d_teacher = teacher.new_empty(teacher.shape if teacher_grad else (0,))
    if student.numel() == 0 or not (student_grad or teacher_grad):
        return d_student, d_teacher
    s, t = operand(student), operand(teacher)
    width = student.shape[-1]
    rows = student.numel() // width
    g = operand(grad.unsqueeze(-1) if grad.dim() else grad.expand(rows, 1), vector=1)
    tile = tile_for(width)
    with device_of(student):
        backward_kernel[(triton.cdiv(rows, tile.rows),)](
            g.tensor,
            s.tensor,
            t.tensor,
            weight,
            stats,
            scale,
            d_student if student_grad else None,
            d_teacher if teacher_grad else None,
            rows,
            *g.layout,
            *s.layout,
            *t.layout,
            S_VECTOR=s.vector,
            T_VECTOR=t.vector,
            WIDTH=width,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return d_student, d_teacher
