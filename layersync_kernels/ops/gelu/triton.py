# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN001, ANN201, ANN202, D103
"""tanh-GELU in Triton: one pass forward, one backward, with the sums over rows for the bias."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import MULTIPROCESSORS, Tile, add_partials, device_of, load_tile, operand, runs_of, store_sums, store_tile

_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBIC = tl.constexpr(0.044715)
_RESIDENT_PROGRAMS = 7 * MULTIPROCESSORS  # of the backward pass, by its registers
_FORWARD_BLOCK = 2048  # 16 values per thread: 64 KiB in flight on a multiprocessor full of threads of a half type
_SQUARE_LIMIT = tl.constexpr(1e3)  # beyond this square the sigmoid is 0 or 1, and the exponential 0


@triton.jit
def _sigmoid(u):
    # gelu(u) = u·σ(2z), 2z = √(8/π)(u + 0.044715u³), where u/2·(1 + tanh z) cancels for negative u. The exponential is
    # that of −|2z|: it cannot overflow, and both σ and 1 − σ come without a subtraction. (Constants stand on the right:
    # the interpreter of Triton 3.8 makes a constant of constant times tensor.)
    decay = tl.exp(tl.abs(u) * -_SLOPE * (u * u * _CUBIC + 1.0))
    large = 1.0 / (1.0 + decay)
    return tl.where(u >= 0, large, decay * large), decay * large * large  # σ(2z), σ(2z)(1 − σ(2z))


@triton.jit(do_not_specialize=["count"])
def forward_kernel(preactivation, activation, count, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count.to(tl.int64) * VECTOR  # the compiler sees that it is the same for all of a vector
    u = tl.load(preactivation + place, mask=mask, other=0.0).to(tl.float32)
    sigmoid, _ = _sigmoid(u)
    tl.store(activation + place, u * sigmoid, mask=mask)


@triton.jit(do_not_specialize=["rows", "run", "d_stride"])
def backward_kernel(
    d_activation,
    preactivation,
    d_preactivation,
    activation,
    sums,  # (parts, WIDTH)
    rows,
    run,
    d_stride,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    end = tl.minimum((part + 1) * run, rows.to(tl.int64))
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    row = part * run + tl.arange(0, ROWS)
    next_u = load_tile(preactivation + row * WIDTH, row < end, first, WIDTH, BLOCK)
    next_gradient = load_tile(d_activation + row * d_stride * VECTOR, row < end, first, WIDTH, BLOCK)
    step = 0
    while step < run:  # not range(): the interpreter of Triton 3.6 cannot count to a tensor beside numpy 2.4
        u, gradient = next_u.to(tl.float32), next_gradient.to(tl.float32)
        row = part * run + step + tl.arange(0, ROWS)
        live = row < end
        step += ROWS
        # Each step loads what the next one needs, because no load moves up across the stores between them.
        after = part * run + step + tl.arange(0, ROWS)
        next_u = load_tile(preactivation + after * WIDTH, after < end, first, WIDTH, BLOCK)
        next_gradient = load_tile(d_activation + after * d_stride * VECTOR, after < end, first, WIDTH, BLOCK)
        sigmoid, slope = _sigmoid(u)
        # u·slope comes first: it is 0 where the square would make an infinity of the rest.
        curve = (tl.minimum(u * u, _SQUARE_LIMIT) * (3.0 * _CUBIC) + 1.0) * _SLOPE
        gradient *= sigmoid + u * slope * curve
        store_tile(d_preactivation + row * WIDTH, gradient, live, first, WIDTH, BLOCK)
        if activation is not None:
            store_tile(activation + row * WIDTH, u * sigmoid, live, first, WIDTH, BLOCK)
        if sums is not None:
            total += gradient
    if sums is not None:
        store_sums(sums + part * WIDTH, total, first, WIDTH, BLOCK)


def tile_for(width: int) -> Tile:
    """Choose the launch of the backward pass by the width alone: 8 values per thread, 256 channels where there are."""
    block = min(triton.next_power_of_2(width), 256)
    return Tile(min(1024 // block, 64), block, 4)


def forward(preactivation: Tensor) -> Tensor:
    """Launch the forward pass; see op.py for arguments and results."""
    activation = torch.empty_like(preactivation)
    count = preactivation.numel()
    if count:
        elements = 16 // preactivation.element_size()
        vector = elements if preactivation.shape[-1] % elements == 0 else 1
        with device_of(preactivation):
            forward_kernel[(triton.cdiv(count, _FORWARD_BLOCK),)](
                preactivation, activation, count // vector, VECTOR=vector, BLOCK=_FORWARD_BLOCK, num_warps=4
            )
    return activation


def backward(
    d_activation: Tensor, preactivation: Tensor, activation: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward pass; see op.py for arguments and results."""
    rows, width = preactivation.shape
    d_preactivation = torch.empty_like(preactivation)
    recomputed = preactivation.new_empty((rows, width) if activation else (0,))
    d_bias = preactivation.new_empty((width if bias else 0,), dtype=torch.float32)
    if preactivation.numel() == 0:
        return d_preactivation, recomputed, d_bias.zero_()
    gradient = operand(d_activation)
    tile = tile_for(width)
    columns = triton.cdiv(width, tile.block)
    run, parts = runs_of(rows, columns, _RESIDENT_PROGRAMS)
    partials = d_bias.new_empty((1, 1, parts, width)) if bias and parts > 1 else None
    with device_of(preactivation):
        backward_kernel[(columns, parts)](
            gradient.tensor,
            preactivation,
            d_preactivation,
            recomputed if activation else None,
            (d_bias if partials is None else partials) if bias else None,
            rows,
            run,
            gradient.layout[2],
            VECTOR=gradient.vector,
            WIDTH=width,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
        if partials is not None:
            add_partials(partials, [d_bias.unsqueeze(0)])
    return d_preactivation, recomputed, d_bias
