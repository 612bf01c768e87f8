# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN001, ANN201, D103
"""tanh-GELU in Triton: one pass forward, one backward, with the sums over rows for the bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import gelu_sigmoid
from ..tiles import (
    MULTIPROCESSORS,
    add_partials,
    column_tile_for,
    device_of,
    load_tile,
    operand,
    runs_of,
    store_sums,
    store_tile,
)

_RESIDENT_PROGRAMS = 7 * MULTIPROCESSORS  # of the backward pass, by its registers
_FORWARD_BLOCK = 2048  # 16 values per thread: 64 KiB in flight on a multiprocessor full of threads of a half type


@triton.jit(do_not_specialize=["count"])
def forward_kernel(preactivation, activation, count, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count.to(tl.int64) * VECTOR  # the compiler sees that it is the same for all of a vector
    u = tl.load(preactivation + place, mask=mask, other=0.0).to(tl.float32)
    sigmoid, _ = gelu_sigmoid(u)
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
        sigmoid, slope = gelu_sigmoid(u)
        gradient *= sigmoid + slope
        store_tile(d_preactivation + row * WIDTH, gradient, live, first, WIDTH, BLOCK)
        if activation is not None:
            store_tile(activation + row * WIDTH, u * sigmoid, live, first, WIDTH, BLOCK)
        if sums is not None:
            total += gradient
    if sums is not None:
        store_sums(sums + part * WIDTH, total, first, WIDTH, BLOCK)


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
    tile = column_tile_for(width)
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
