# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN001, ANN201, ANN202, D103
"""The projection in Triton, with the sums of the cosine in the epilogue of its GEMM; for half types.

A program owns its rows for all of their projected channels, a tile of them at a time, so that no sum leaves it. z goes
to memory only where the backward pass will read it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cosine_alignment.reference import reduce_rows
from ..tiles import cosine_of, device_of, layout_names, load_tile, operand, row_offset, store_alignment, store_tile

_ROWS, _BLOCK, _DEPTH_BLOCK = 64, 128, 64  # 128 programs for a chunk of 8192 rows; 256 columns would spill
_EXPONENT = tl.constexpr(0x7F800000)
_LARGEST_EXPONENT = tl.constexpr(0x7E800000)  # whose reciprocal is not subnormal
_RECIPROCAL = tl.constexpr(0x7F000000)  # minus the bits of a power of two: those of its reciprocal


@triton.jit
def _rescaled(tile, largest, factor):
    # Takes a tile into the range of its row so far, whose squares could leave that of fp32. All factors are powers of
    # two. Returns the scaled tile, the largest value, the factor, and what to multiply older sums by.
    largest = tl.maximum(largest, tl.max(tl.abs(tile), axis=1))
    exponent = tl.minimum(largest.to(tl.int32, bitcast=True) & _EXPONENT, _LARGEST_EXPONENT)
    new = (exponent * -1 + _RECIPROCAL).to(tl.float32, bitcast=True)
    return tile * new[:, None], largest, new, tl.div_rn(new, factor)


@triton.jit(do_not_specialize=["rows", "h_stride", *layout_names("t")])
def project_kernel(
    hidden,
    weight,  # (WIDTH, DEPTH)
    bias,  # or None
    teacher,
    row_weight,  # or None
    stats,  # (3, rows)
    z,  # (rows, WIDTH) or None
    rows,
    h_stride,
    t_inner,
    t_outer_stride,
    t_inner_stride,
    eps,
    H_VECTOR: tl.constexpr,
    T_VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    live = inside
    if row_weight is not None:
        live = inside & (tl.load(row_weight + row, mask=inside, other=0.0) != 0)
    hidden += row * h_stride * H_VECTOR
    teacher += row_offset(row, rows, t_inner, t_outer_stride, t_inner_stride, T_VECTOR)
    ss = tl.zeros((ROWS,), tl.float32)
    tt = tl.zeros((ROWS,), tl.float32)
    st = tl.zeros((ROWS,), tl.float32)
    s_largest = tl.zeros((ROWS,), tl.float32)
    t_largest = tl.zeros((ROWS,), tl.float32)
    s_factor = tl.full((ROWS,), 1.0, tl.float32)
    t_factor = tl.full((ROWS,), 1.0, tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        columns = column < WIDTH
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for depth in range(0, DEPTH, DEPTH_BLOCK):
            h = load_tile(hidden, live, depth, DEPTH, DEPTH_BLOCK)
            w = load_tile(weight + column.to(tl.int64) * DEPTH, columns, depth, DEPTH, DEPTH_BLOCK)
            total = tl.dot(h, tl.trans(w), total)
        if bias is not None:
            total += tl.load(bias + column, mask=columns, other=0.0).to(tl.float32)[None, :]
        rounded = total.to(hidden.dtype.element_ty)  # as the library's GEMM leaves it
        if z is not None:
            store_tile(z + row * WIDTH, rounded, inside, start, WIDTH, BLOCK)
        s, s_largest, s_factor, shrink = _rescaled(rounded.to(tl.float32), s_largest, s_factor)
        t = load_tile(teacher, live, start, WIDTH, BLOCK).to(tl.float32)
        t, t_largest, t_factor, t_shrink = _rescaled(t, t_largest, t_factor)
        ss = ss * shrink * shrink + tl.sum(s * s, axis=1)
        tt = tt * t_shrink * t_shrink + tl.sum(t * t, axis=1)
        st = st * shrink * t_shrink + tl.sum(s * t, axis=1)
    cosine, s_rnorm, t_rnorm = cosine_of(ss, tt, st, s_factor, t_factor, eps)
    cosine, s_rnorm, t_rnorm = tl.where(live, cosine, 0.0), tl.where(live, s_rnorm, 0.0), tl.where(live, t_rnorm, 0.0)
    store_alignment(stats, row, rows, inside, cosine, s_rnorm, t_rnorm)


def project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    row_weight: Tensor | None,
    eps: float,
    reduction: int,
    z: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel; see op.py for arguments and results."""
    h, t = operand(hidden), operand(teacher)
    rows, depth = hidden.shape
    width = weight.shape[0]
    stats = hidden.new_empty((3, rows), dtype=torch.float32)
    with device_of(hidden):
        project_kernel[(triton.cdiv(rows, _ROWS),)](
            h.tensor,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            t.tensor,
            row_weight,
            stats,
            z,
            rows,
            h.layout[2],
            *t.layout,
            eps,
            H_VECTOR=h.vector,
            T_VECTOR=t.vector,
            WIDTH=width,
            DEPTH=depth,
            ROWS=_ROWS,
            BLOCK=_BLOCK,
            DEPTH_BLOCK=_DEPTH_BLOCK,
            num_warps=8,
            num_stages=3,
        )
    loss = reduce_rows(stats[0], row_weight, "sum" if reduction else "none")
    return loss, stats, loss.new_ones(())
