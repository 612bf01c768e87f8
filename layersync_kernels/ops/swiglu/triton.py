# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN001, ANN201, D103
"""Gated linear units in Triton: one pass forward, one backward, with the sums over rows for the bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import gelu_sigmoid, silu_sigmoid
from ..tiles import (
    MULTIPROCESSORS,
    add_partials,
    column_tile_for,
    device_of,
    layout_names,
    load_tile,
    operand,
    row_offset,
    runs_of,
    store_sums,
    store_tile,
)

_RESIDENT_PROGRAMS = 4 * MULTIPROCESSORS  # of the backward pass, by its registers


@triton.jit
def load_halves(
    starts, live, first, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    # Channels first to first + BLOCK of both halves.
    if INTERLEAVED:
        pairs = load_tile(starts, live, 2 * first, 2 * WIDTH, 2 * BLOCK)
        gate, value = tl.split(tl.reshape(pairs, (ROWS, BLOCK, 2)))
    else:
        gate = load_tile(starts, live, first, WIDTH, BLOCK)
        value = load_tile(starts + WIDTH, live, first, WIDTH, BLOCK)
    return gate, value


@triton.jit
def sigmoid_of(gate, GELU: tl.constexpr):
    if GELU:
        sigmoid, slope = gelu_sigmoid(gate)
    else:
        sigmoid, slope = silu_sigmoid(gate)
    return sigmoid, slope


@triton.jit(do_not_specialize=["rows", *layout_names("x")])
def forward_kernel(
    x12,
    out,
    rows,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    X_VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * BLOCK
    live = row < rows
    starts = x12 + row_offset(row, rows, x_inner, x_outer_stride, x_inner_stride, X_VECTOR)
    gate, value = load_halves(starts, live, first, WIDTH, INTERLEAVED, ROWS, BLOCK)
    gate = gate.to(tl.float32)
    sigmoid, _ = sigmoid_of(gate, GELU)
    store_tile(out + row * WIDTH, gate * sigmoid * value.to(tl.float32), live, first, WIDTH, BLOCK)


@triton.jit(do_not_specialize=["rows", "run", *layout_names("gx")])
def backward_kernel(
    grad,
    x12,
    d_x12,
    out,
    sums,  # (parts, 2 * WIDTH)
    rows,
    run,
    g_inner,
    g_outer_stride,
    g_inner_stride,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    G_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    end = tl.minimum((part + 1) * run, rows.to(tl.int64))
    gate_total = tl.zeros((ROWS, BLOCK), tl.float32)
    value_total = tl.zeros((ROWS, BLOCK), tl.float32)
    row = part * run + tl.arange(0, ROWS)
    starts = x12 + row_offset(row, rows, x_inner, x_outer_stride, x_inner_stride, X_VECTOR)
    next_gate, next_value = load_halves(starts, row < end, first, WIDTH, INTERLEAVED, ROWS, BLOCK)
    starts = grad + row_offset(row, rows, g_inner, g_outer_stride, g_inner_stride, G_VECTOR)
    next_gradient = load_tile(starts, row < end, first, WIDTH, BLOCK)
    step = 0
    while step < run:  # not range(): the interpreter of Triton 3.6 cannot count to a tensor beside numpy 2.4
        gate, value = next_gate.to(tl.float32), next_value.to(tl.float32)
        gradient = next_gradient.to(tl.float32)
        row = part * run + step + tl.arange(0, ROWS)
        live = row < end
        step += ROWS
        # Each step loads what the next one needs, because no load moves up across the stores between them.
        after = part * run + step + tl.arange(0, ROWS)
        starts = x12 + row_offset(after, rows, x_inner, x_outer_stride, x_inner_stride, X_VECTOR)
        next_gate, next_value = load_halves(starts, after < end, first, WIDTH, INTERLEAVED, ROWS, BLOCK)
        starts = grad + row_offset(after, rows, g_inner, g_outer_stride, g_inner_stride, G_VECTOR)
        next_gradient = load_tile(starts, after < end, first, WIDTH, BLOCK)
        sigmoid, slope = sigmoid_of(gate, GELU)
        gated = gate * sigmoid
        if out is not None:
            store_tile(out + row * WIDTH, gated * value, live, first, WIDTH, BLOCK)
        d_gate = gradient * value * (sigmoid + slope)
        d_value = gradient * gated
        if INTERLEAVED:
            pairs = tl.reshape(tl.join(d_gate, d_value), (ROWS, 2 * BLOCK))
            store_tile(d_x12 + row * (2 * WIDTH), pairs, live, 2 * first, 2 * WIDTH, 2 * BLOCK)
        else:
            store_tile(d_x12 + row * (2 * WIDTH), d_gate, live, first, WIDTH, BLOCK)
            store_tile(d_x12 + row * (2 * WIDTH) + WIDTH, d_value, live, first, WIDTH, BLOCK)
        if sums is not None:
            gate_total += d_gate
            value_total += d_value
    if sums is not None:
        starts = sums + part * (2 * WIDTH)
        if INTERLEAVED:
            pairs = tl.reshape(tl.join(gate_total, value_total), (ROWS, 2 * BLOCK))
            store_sums(starts, pairs, 2 * first, 2 * WIDTH, 2 * BLOCK)
        else:
            store_sums(starts, gate_total, first, WIDTH, BLOCK)
            store_sums(starts + WIDTH, value_total, first, WIDTH, BLOCK)


def forward(x12: Tensor, gelu: bool, interleaved: bool) -> Tensor:
    """Launch the forward pass; see op.py for arguments and result."""
    width = x12.shape[-1] // 2
    out = x12.new_empty((*x12.shape[:-1], width))
    if out.numel():
        halves = operand(x12)
        tile = column_tile_for(width)
        rows = out.numel() // width
        with device_of(x12):
            forward_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.block))](
                halves.tensor,
                out,
                rows,
                *halves.layout,
                X_VECTOR=halves.vector,
                WIDTH=width,
                GELU=gelu,
                INTERLEAVED=interleaved,
                ROWS=tile.rows,
                BLOCK=tile.block,
                num_warps=tile.warps,
            )
    return out


def backward(
    grad: Tensor, x12: Tensor, gelu: bool, interleaved: bool, output: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward pass; see op.py for arguments and results."""
    width = x12.shape[-1] // 2
    d_x12 = torch.empty(x12.shape, dtype=x12.dtype, device=x12.device)
    out = x12.new_empty(grad.shape if output else (0,))
    d_bias = x12.new_empty((2 * width if bias else 0,), dtype=torch.float32)
    if x12.numel() == 0:
        return d_x12, out, d_bias.zero_()
    gradient, halves = operand(grad), operand(x12)
    tile = column_tile_for(width)
    rows, columns = grad.numel() // width, triton.cdiv(width, tile.block)
    run, parts = runs_of(rows, columns, _RESIDENT_PROGRAMS)
    partials = d_bias.new_empty((1, 1, parts, 2 * width)) if bias and parts > 1 else None
    with device_of(x12):
        backward_kernel[(columns, parts)](
            gradient.tensor,
            halves.tensor,
            d_x12,
            out if output else None,
            (d_bias if partials is None else partials) if bias else None,
            rows,
            run,
            *gradient.layout,
            *halves.layout,
            G_VECTOR=gradient.vector,
            X_VECTOR=halves.vector,
            WIDTH=width,
            GELU=gelu,
            INTERLEAVED=interleaved,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
        if partials is not None:
            add_partials(partials, [d_bias.unsqueeze(0)])
    return d_x12, out, d_bias
