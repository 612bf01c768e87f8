# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN001, ANN201, ANN202, D103
"""A strip of gram_alignment in Triton: the product and what becomes of it in one kernel, as in flash attention."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import device_of
from . import strips
from .op import KINDS
from .strips import Strip

_RELU = tl.constexpr(KINDS["relu"])
_SQUARE = tl.constexpr(KINDS["square"])
_ABS = tl.constexpr(KINDS["abs"])


@triton.jit
def _term(difference, margin, KIND: tl.constexpr):
    # Its value and derivative; a NaN shows in both.
    distance = tl.abs(difference)
    excess = distance - margin
    nothing = excess <= 0
    sign = tl.where(difference < 0, -1.0, 1.0) + (excess - excess)
    if KIND == _SQUARE:
        value = excess * excess
        sign *= 2.0 * excess
    elif KIND == _ABS:
        value = distance
    else:
        value = excess
    return tl.where(nothing, 0.0, value), tl.where(nothing, 0.0, sign)


@triton.jit(do_not_specialize=["height", "width", "sample_stride", "margin"])
def strip_kernel(
    u,  # (samples, height, CHANNELS), contiguous
    v,  # (samples, width, CHANNELS), rows contiguous, samples at `sample_stride` vectors
    gradient,  # (samples, height, width), or None
    sums,  # (samples, row tiles, column tiles)
    height,
    width,
    sample_stride,
    margin,
    VECTOR: tl.constexpr,  # of channels
    TOKENS: tl.constexpr,  # in 16 bytes of `gradient` where its rows are aligned, else 1
    CHANNELS: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_starts = u + sample * height * CHANNELS + row.to(tl.int64)[:, None] * CHANNELS
    column_starts = v + sample * sample_stride * VECTOR + column.to(tl.int64)[None, :] * CHANNELS
    difference = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, CHANNELS, STEP):
        channel = start + tl.arange(0, STEP)
        a = tl.load(
            row_starts + channel[None, :], mask=(row[:, None] < height) & (channel[None, :] < CHANNELS), other=0.0
        )
        b = tl.load(
            column_starts + channel[:, None], mask=(column[None, :] < width) & (channel[:, None] < CHANNELS), other=0.0
        )
        difference = tl.dot(a, b, difference, input_precision=PRECISION)
    value, derivative = _term(difference, margin, KIND)
    # Differences beyond the strip are 0. Columns beyond the diagonal block stand for their mirror images too.
    value *= tl.where(column[None, :] < height, 1.0, 2.0)
    total = tl.sum(tl.sum(value, axis=1), axis=0)
    tile = (sample * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + tile, total)
    if gradient is not None:
        # The stride counts vectors: the compiler sees how rows are aligned, and that a mask is the same for a vector.
        stride = (width // TOKENS) * TOKENS
        place = (sample * height + row[:, None]) * stride + column[None, :]
        inside = (row[:, None] < height) & (column[None, :] < stride)
        tl.store(gradient + place, derivative, mask=inside)


def strip(strip: Strip) -> Tensor:
    """Launch a strip; see strips.py."""
    u, v = strip.u, strip.v
    if u.dtype == torch.bfloat16:  # on a CPU, where Triton's interpreter cannot multiply it
        u, v = u.float(), v.float()
    samples, height, channels = u.shape
    width = v.shape[1]
    rows, columns, step, warps = (64, 64, 32, 4) if u.dtype == torch.float32 else (128, 128, 64, 8)
    grid = (triton.cdiv(width, columns), triton.cdiv(height, rows), samples)
    sums = u.new_empty((samples, grid[0] * grid[1]), dtype=torch.float32)
    elements = 16 // u.element_size()
    vector = elements if channels % elements == 0 else 1
    tokens = elements if width % elements == 0 else 1
    with device_of(u):
        strip_kernel[grid](
            u,
            v,
            strip.gradient,
            sums,
            height,
            width,
            v.stride(0) // vector,
            strip.margin,
            VECTOR=vector,
            TOKENS=tokens,
            CHANNELS=channels,
            KIND=strip.kind,
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            ROWS=rows,
            COLUMNS=columns,
            STEP=step,
            num_warps=warps,
        )
    return sums


def run(*args: Any) -> tuple[Tensor, Tensor]:
    """Compute the raw op by strips; see strips.py."""
    return strips.run(strip, *args)
