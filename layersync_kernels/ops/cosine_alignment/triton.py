# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN001, ANN201, ANN202, D103
"""cosine_alignment in Triton: one pass over both tensors forward, one backward, the semantics of csrc/cosine_alignment.

A program takes a tile of rows and walks over their channels, 8 values per thread and step, which are one 16-byte access
in half types: a warp for each row up to 2048 channels, a block for a longer one. Sums over rows are deterministic: one
partial per program, then a second kernel that adds them in order.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import Rows, as_rows

_NONE, _MEAN = 0, 1  # as op.REDUCTIONS

# The square of a fp32 or bf16 row overflows from 1e19 on and vanishes below 1e-19. Outside of this window a row is read
# again, scaled by a power of two. Not needed at the lower end where eps alone decides, which makes rows of zeros free.
_SMALLEST_SQUARE = tl.constexpr(1e-30)
_LARGEST_SQUARE = tl.constexpr(1e37)
_EPS_DECIDES = 1e-14
_SHRINK = tl.constexpr(2.0**-80)
_GROW = tl.constexpr(2.0**100)

_FINISH_BLOCK = 8192  # two steps for the partials of 65,536 rows

# No integer is specialised on, so that neither batch nor tokens recompile; alignment comes with the VECTOR constants.
_LAYOUTS = ["rows", *(f"{x}_{y}" for x in "gst" for y in ("inner", "outer_stride", "inner_stride"))]


@triton.jit
def _row_offset(row, rows, inner, outer_stride, inner_stride, VECTOR: tl.constexpr):
    # Strides count vectors of VECTOR elements: the compiler sees how rows are aligned, and specialises on no stride.
    if inner >= rows:  # one stride, as rows mostly have: spares a 64-bit division
        offset = row * inner_stride
    else:
        outer = row // inner
        offset = outer * outer_stride + (row - outer * inner) * inner_stride
    return offset * VECTOR


@triton.jit
def _load_pair(student, teacher, live, start: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (column < WIDTH)
    s = tl.load(student[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(teacher[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    return s, t


@triton.jit
def _dots(student, teacher, live, s_factor, t_factor, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    ss = tl.zeros((ROWS, BLOCK), tl.float32)
    tt = tl.zeros((ROWS, BLOCK), tl.float32)
    st = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        s, t = _load_pair(student, teacher, live, start, WIDTH, BLOCK)
        s *= s_factor
        t *= t_factor
        ss += s * s
        tt += t * t
        st += s * t
    return tl.sum(ss, axis=1), tl.sum(tt, axis=1), tl.sum(st, axis=1)


@triton.jit
def _range_factor(square):
    return tl.where(square < _LARGEST_SQUARE, tl.where(square > _SMALLEST_SQUARE, 1.0, _GROW), _SHRINK)


@triton.jit(do_not_specialize=[name for name in _LAYOUTS if not name.startswith("g")])
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
    smallest_square,
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
    student += _row_offset(row, rows, s_inner, s_outer_stride, s_inner_stride, S_VECTOR)
    teacher += _row_offset(row, rows, t_inner, t_outer_stride, t_inner_stride, T_VECTOR)

    s_factor = tl.full((ROWS,), 1.0, tl.float32)
    t_factor = s_factor
    ss, tt, st = _dots(student, teacher, live, 1.0, 1.0, WIDTH, ROWS, BLOCK)
    s_fits = (ss < _LARGEST_SQUARE) & (ss > smallest_square)
    t_fits = (tt < _LARGEST_SQUARE) & (tt > smallest_square)
    again = live & ~(s_fits & t_fits)
    if tl.max(again.to(tl.int32), axis=0) > 0:
        s_factor = tl.where(again, _range_factor(ss), 1.0)
        t_factor = tl.where(again, _range_factor(tt), 1.0)
        ss, tt, st = _dots(student, teacher, live, s_factor[:, None], t_factor[:, None], WIDTH, ROWS, BLOCK)

    s_norm = tl.sqrt_rn(ss)
    t_norm = tl.sqrt_rn(tt)
    s_norm += s_norm - s_norm  # an infinite element makes a NaN of the row, as x / norm(x) does
    t_norm += t_norm - t_norm
    zero = (s_norm < eps * s_factor) | (t_norm < eps * t_factor)
    nothing = (s_norm - s_norm) + (t_norm - t_norm)  # 0, or the NaN of the other row
    s_rnorm = tl.div_rn(1.0, tl.where(zero, 1.0, s_norm))
    t_rnorm = tl.div_rn(1.0, tl.where(zero, 1.0, t_norm))
    cosine = tl.where(zero, nothing, st * s_rnorm * t_rnorm)
    tl.store(stats + row, cosine, mask=inside)
    tl.store(stats + rows + row, tl.where(zero, nothing, s_rnorm * s_factor), mask=inside)
    tl.store(stats + 2 * rows.to(tl.int64) + row, tl.where(zero, nothing, t_rnorm * t_factor), mask=inside)

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


@triton.jit(do_not_specialize=_LAYOUTS)
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
    factor = -tl.load(grad + _row_offset(row, rows, g_inner, g_outer_stride, g_inner_stride, 1), mask=inside, other=0.0)
    factor *= tl.load(scale)
    live = inside & ((s_rnorm != 0) | (t_rnorm != 0))  # else masked, or a row of zeros
    if weight is not None:
        w = tl.load(weight + row, mask=inside, other=0.0)
        factor *= w
    student += _row_offset(row, rows, s_inner, s_outer_stride, s_inner_stride, S_VECTOR)
    teacher += _row_offset(row, rows, t_inner, t_outer_stride, t_inner_stride, T_VECTOR)

    # The order of the products keeps rows near 1e30 in range, where s_rnorm * t_rnorm would vanish.
    s_away, s_factor = (cosine * s_rnorm)[:, None], (factor * s_rnorm)[:, None]
    t_away, t_factor = (cosine * t_rnorm)[:, None], (factor * t_rnorm)[:, None]
    s_toward, t_toward = t_rnorm[:, None], s_rnorm[:, None]
    # Each step loads what the next one needs, because no load moves up across the stores between them.
    s_next, t_next = _load_pair(student, teacher, live, 0, WIDTH, BLOCK)
    for start in tl.static_range(0, WIDTH, BLOCK):
        s, t = s_next, t_next
        if start + BLOCK < WIDTH:
            s_next, t_next = _load_pair(student, teacher, live, start + BLOCK, WIDTH, BLOCK)
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (column < WIDTH)
        place = row[:, None] * WIDTH + column
        if student_grad is not None:
            value = tl.where(live[:, None], (t * s_toward - s * s_away) * s_factor, 0.0)
            tl.store(student_grad + place, value, mask=mask)
        if teacher_grad is not None:
            value = tl.where(live[:, None], (s * t_toward - t * t_away) * t_factor, 0.0)
            tl.store(teacher_grad + place, value, mask=mask)


class Tile(NamedTuple):
    """What a program of `warps` warps works on: `rows` rows, `block` channels at a time."""

    rows: int
    block: int
    warps: int


def tile_for(width: int) -> Tile:
    """Choose the launch by the width of the rows alone."""
    if width <= 2048:  # a warp per row, several rows where 256 channels are not to be had
        block = min(triton.next_power_of_2(max(width, 1)), 256)
        return Tile(min(1024 // block, 64), block, 4)
    # A block per row, in at most 32 steps: they are unrolled.
    return Tile(1, max(2048, triton.next_power_of_2(triton.cdiv(width, 32))), 8)


def vector_of(rows: Rows) -> int:
    """Elements in 16 bytes where every row starts on a multiple of them, else 1."""
    elements = 16 // rows.tensor.element_size()
    return elements if (rows.outer_stride | rows.inner_stride) % elements == 0 else 1


def _layout(rows: Rows, vector: int) -> tuple[int, int, int]:
    return rows.inner, rows.outer_stride // vector, rows.inner_stride // vector


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def forward(
    student: Tensor, teacher: Tensor, weight: Tensor | None, eps: float, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward pass; see op.py for arguments and results."""
    s, t = as_rows(student), as_rows(teacher)
    tile = tile_for(s.width)
    programs = max(triton.cdiv(s.count, tile.rows), 1)
    none = reduction == _NONE
    stats = student.new_empty((3, s.count), dtype=torch.float32)
    loss = student.new_empty(student.shape[:-1] if none else (), dtype=torch.float32)
    scale = student.new_empty((), dtype=torch.float32)
    partials = None if none else student.new_empty((2, programs), dtype=torch.float32)
    s_vector, t_vector = vector_of(s), vector_of(t)
    with _device_of(student):
        forward_kernel[(programs,)](
            s.tensor,
            t.tensor,
            weight,
            stats,
            loss if none else None,
            partials,
            scale,
            s.count,
            *_layout(s, s_vector),
            *_layout(t, t_vector),
            eps,
            -1.0 if eps > _EPS_DECIDES else _SMALLEST_SQUARE.value,
            S_VECTOR=s_vector,
            T_VECTOR=t_vector,
            WIDTH=s.width,
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
    s, t = as_rows(student), as_rows(teacher)
    g = as_rows(grad.unsqueeze(-1)) if grad.dim() else Rows(grad, 1, 1, s.count, 0, 0)
    tile = tile_for(s.width)
    s_vector, t_vector = vector_of(s), vector_of(t)
    with _device_of(student):
        backward_kernel[(triton.cdiv(s.count, tile.rows),)](
            g.tensor,
            s.tensor,
            t.tensor,
            weight,
            stats,
            scale,
            d_student if student_grad else None,
            d_teacher if teacher_grad else None,
            s.count,
            *_layout(g, 1),
            *_layout(s, s_vector),
            *_layout(t, t_vector),
            S_VECTOR=s_vector,
            T_VECTOR=t_vector,
            WIDTH=s.width,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return d_student, d_teacher
