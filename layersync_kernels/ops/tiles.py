# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN001, ANN201, D103
"""What the Triton kernels of all ops share: addresses, tiles, sums over rows, the cosine of a pair of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import as_rows

# ---- Rows and tiles


@triton.jit
def row_offset(row, rows, inner, outer_stride, inner_stride, VECTOR: tl.constexpr):
    # Strides count vectors of VECTOR elements: the compiler sees how rows are aligned, and specialises on no stride.
    if inner >= rows:  # one stride, as rows mostly have: spares a 64-bit division
        offset = row * inner_stride
    else:
        outer = row // inner
        offset = outer * outer_stride + (row - outer * inner) * inner_stride
    return offset * VECTOR


@triton.jit
def load_tile(starts, live, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    # Channels start to start + BLOCK of the rows at `starts`; 0 beyond the width and in rows that are not live.
    column = start + tl.arange(0, BLOCK)[None, :]
    return tl.load(starts[:, None] + column, mask=live[:, None] & (column < WIDTH), other=0.0)


@triton.jit
def store_tile(starts, value, live, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)[None, :]
    tl.store(starts[:, None] + column, value, mask=live[:, None] & (column < WIDTH))


@triton.jit
def store_sums(sums, values, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    # The sums over the rows of `values` into one row at `sums`.
    starts = sums + tl.zeros((1,), tl.int32)
    store_tile(starts, tl.sum(values, axis=0)[None, :], tl.full((1,), 1, tl.int1), start, WIDTH, BLOCK)


class Operand(NamedTuple):
    """A (..., D) tensor as a kernel takes it; strides count vectors. All of it is neutral where there is no tensor."""

    tensor: Tensor | None
    layout: tuple[int, int, int]  # inner, outer_stride, inner_stride
    vector: int  # elements in 16 bytes where every row starts on a multiple of them, else 1


def operand(tensor: Tensor | None, vector: int | None = None) -> Operand:
    if tensor is None:
        return Operand(None, (1, 0, 0), 1)
    rows = as_rows(tensor)
    if vector is None:
        elements = 16 // tensor.element_size()
        vector = elements if (rows.outer_stride | rows.inner_stride) % elements == 0 else 1
    return Operand(rows.tensor, (rows.inner, rows.outer_stride // vector, rows.inner_stride // vector), vector)


def layout_names(prefixes: str) -> list[str]:
    """The names of the integers in the layouts of operands, for do_not_specialize."""
    return [f"{prefix}_{name}" for prefix in prefixes for name in ("inner", "outer_stride", "inner_stride")]


class Tile(NamedTuple):
    """What a program of `warps` warps works on: `rows` rows, `block` channels at a time."""

    rows: int
    block: int
    warps: int


def block_for(width: int) -> int:
    """Channels of a step of a warp: 256, or 128 where two steps of 256 would be a quarter empty."""
    return 128 if 256 < width <= 384 else min(triton.next_power_of_2(max(width, 1)), 256)


def tile_for(width: int) -> Tile:
    """Choose the launch by the width of the rows alone."""
    if width <= 2048:  # a warp per row, several rows where 256 channels are not to be had
        block = block_for(width)
        return Tile(min(1024 // block, 64), block, 4)
    # A block per row, in at most 32 steps: they are unrolled.
    return Tile(1, max(2048, triton.next_power_of_2(triton.cdiv(width, 32))), 8)


def column_tile_for(width: int) -> Tile:
    """The tile of a pass that sums columns over rows: 8 values per thread, 256 channels where there are."""
    block = min(triton.next_power_of_2(width), 256)
    return Tile(min(1024 // block, 64), block, 4)


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# ---- Sums over rows: each program sums a run of rows, then the runs of a group are added in order

MULTIPROCESSORS = 132  # of an H100; frozen, so that sums do not depend on the card
_SHORTEST_RUN = 16  # rows whose traffic makes that of the partial sums small


class Runs(NamedTuple):
    """How the rows of a group are cut: into `parts` runs of `length` rows, of which the last may be shorter."""

    length: int
    parts: int


def runs_of(rows: int, programs: int, resident: int) -> Runs:
    """Cut `rows` rows, with `programs` programs for each part, so that the `resident` that run at once do it all."""
    length = max(triton.cdiv(rows, max(resident // programs, 1)), _SHORTEST_RUN)
    return Runs(length, triton.cdiv(rows, length))


@triton.jit(do_not_specialize=["groups", "parts"])
def sum_kernel(
    partials,  # (1 to 4, groups, parts, WIDTH)
    first,  # (groups, WIDTH)
    second,
    third,
    fourth,
    groups,
    parts,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2)
    sums = first
    if which == 1:
        sums = second
    if which == 2:
        sums = third
    if which == 3:
        sums = fourth
    first_column = tl.program_id(0) * BLOCK
    first_row = partials + (which * groups + group) * parts * WIDTH
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    part = 0
    while part < parts:  # not range(): the interpreter of Triton 3.6 cannot count to a tensor beside numpy 2.4
        row = part + tl.arange(0, ROWS)
        total += load_tile(first_row + row * WIDTH, row < parts, first_column, WIDTH, BLOCK)
        part += ROWS
    store_sums(sums + group * WIDTH, total, first_column, WIDTH, BLOCK)


def add_partials(partials: Tensor, sums: Sequence[Tensor]) -> None:
    """Add `partials` (len(sums), G, parts, D) over the parts, in order, into `sums`, at most four of (G, D)."""
    _, groups, parts, width = partials.shape
    block = min(triton.next_power_of_2(width), 64)
    outputs = (list(sums) * 4)[:4]
    grid = (triton.cdiv(width, block), groups, len(sums))
    sum_kernel[grid](partials, *outputs, groups, parts, WIDTH=width, ROWS=32, BLOCK=block, num_warps=4)


# ---- The cosine of two rows

# The square of a fp32 or bf16 row overflows from 1e19 on and vanishes below 1e-19. Outside of this window a row is read
# again, scaled by a power of two. Not needed at the lower end where eps alone decides, which makes rows of zeros free.
_SMALLEST_SQUARE = tl.constexpr(1e-30)
_LARGEST_SQUARE = tl.constexpr(1e37)
_EPS_DECIDES = 1e-14
_SHRINK = tl.constexpr(2.0**-80)
_GROW = tl.constexpr(2.0**100)


def smallest_square(eps: float) -> float:
    return -1.0 if eps > _EPS_DECIDES else _SMALLEST_SQUARE.value


@triton.jit
def fits(square, smallest):
    return (square < _LARGEST_SQUARE) & (square > smallest)


@triton.jit
def range_factor(square):
    return tl.where(square < _LARGEST_SQUARE, tl.where(square > _SMALLEST_SQUARE, 1.0, _GROW), _SHRINK)


@triton.jit
def cosine_of(ss, tt, st, s_factor, t_factor, eps):
    # The cosine and both reciprocal norms, from the dot products of the rows times their factors.
    s_norm = tl.sqrt_rn(ss)
    t_norm = tl.sqrt_rn(tt)
    s_norm += s_norm - s_norm  # an infinite element makes a NaN of the row, as x / norm(x) does
    t_norm += t_norm - t_norm
    zero = (s_norm < eps * s_factor) | (t_norm < eps * t_factor)
    nothing = (s_norm - s_norm) + (t_norm - t_norm)  # 0, or the NaN of the other row
    s_rnorm = tl.div_rn(1.0, tl.where(zero, 1.0, s_norm))
    t_rnorm = tl.div_rn(1.0, tl.where(zero, 1.0, t_norm))
    cosine = tl.where(zero, nothing, st * s_rnorm * t_rnorm)
    return cosine, tl.where(zero, nothing, s_rnorm * s_factor), tl.where(zero, nothing, t_rnorm * t_factor)


@triton.jit
def store_alignment(alignment, row, rows, inside, cosine, s_rnorm, t_rnorm):
    tl.store(alignment + row, cosine, mask=inside)
    tl.store(alignment + rows + row, s_rnorm, mask=inside)
    tl.store(alignment + 2 * rows.to(tl.int64) + row, t_rnorm, mask=inside)
