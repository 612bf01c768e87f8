# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN001, ANN201, D103
"""spatial_norm in Triton, with the semantics of csrc/spatial_norm."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..rows import as_rows
from ..tiles import device_of, load_tile, operand, store_tile

_SHRINK = tl.constexpr(2.0**-80)
_LARGEST_SQUARES = tl.constexpr(1e37)
_ROWS, _BLOCK = 32, 64  # 16 values a thread: half types read 128 bytes of a token, and twice 16 bytes a thread


@triton.jit(do_not_specialize=["tokens", "sample_stride", "token_stride"])
def forward_kernel(
    x,
    y,
    tokens,
    sample_stride,
    token_stride,
    kept_mean,
    eps,
    VECTOR: tl.constexpr,  # strides count vectors: the compiler sees how rows are aligned
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program takes a block of the channels of a sample. It reads the tokens three times, twice from the cache. Every
    # value is taken less that of the first token: equal tokens have deviations of 0, and sums keep their digits far
    # from 0.
    tiles: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles) * BLOCK
    x += sample * sample_stride * VECTOR
    y += sample * tokens * WIDTH
    one = tl.zeros((1,), tl.int64)
    first = load_tile(x + one, one == 0, start, WIDTH, BLOCK).to(tl.float32)

    total = tl.zeros((ROWS, BLOCK), tl.float32)
    token = tl.arange(0, ROWS).to(tl.int64)
    step = 0
    while step < tokens:  # not range(): the interpreter of Triton 3.6 cannot count to a tensor beside numpy 2.4
        live = token < tokens
        value = load_tile(x + token * token_stride * VECTOR, live, start, WIDTH, BLOCK).to(tl.float32)
        total += tl.where(live[:, None], value - first, 0.0)
        token += ROWS
        step += ROWS
    mean = tl.div_rn(tl.sum(total, axis=0), tokens.to(tl.float32))[None, :]

    # Squares that leave the range of fp32 are there a second time, of shrunken deviations.
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    shrunken = tl.zeros((ROWS, BLOCK), tl.float32)
    token = tl.arange(0, ROWS).to(tl.int64)
    step = 0
    while step < tokens:
        live = token < tokens
        value = load_tile(x + token * token_stride * VECTOR, live, start, WIDTH, BLOCK).to(tl.float32)
        deviation = tl.where(live[:, None], value - first - mean, 0.0)
        total += deviation * deviation
        deviation *= _SHRINK
        shrunken += deviation * deviation
        token += ROWS
        step += ROWS
    squares = tl.sum(total, axis=0)[None, :]
    fits = squares < _LARGEST_SQUARES
    squares = tl.where(fits, squares, tl.sum(shrunken, axis=0)[None, :])
    std = tl.sqrt_rn(tl.div_rn(squares, (tokens - 1).to(tl.float32)))
    std = tl.where(fits, std, std * (1.0 / _SHRINK))
    scale = tl.div_rn(1.0, std + eps)
    mean -= kept_mean * (first + mean)

    token = tl.arange(0, ROWS).to(tl.int64)
    step = 0
    while step < tokens:
        live = token < tokens
        value = load_tile(x + token * token_stride * VECTOR, live, start, WIDTH, BLOCK).to(tl.float32)
        store_tile(y + token * WIDTH, (value - first - mean) * scale, live, start, WIDTH, BLOCK)
        token += ROWS
        step += ROWS


def spatial_norm(x: Tensor, alpha: float, eps: float) -> Tensor:
    """Launch the kernel; see op.py for arguments and result."""
    samples, tokens, width = x.shape
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    x = as_rows(x).tensor  # a copy where its channels are not dense
    vector = operand(x).vector
    with device_of(x):
        forward_kernel[(triton.cdiv(width, _BLOCK) * samples,)](
            x,
            y,
            tokens,
            x.stride(0) // vector,
            x.stride(1) // vector,
            1 - alpha,
            eps,
            VECTOR=vector,
            WIDTH=width,
            ROWS=_ROWS,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return y
