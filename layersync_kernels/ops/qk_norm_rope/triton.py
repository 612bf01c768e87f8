# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN001, ANN201, D103
"""Norm and rotary positions of queries and keys in Triton: a pass forward, and one backward with its sums over tokens.

A head is worked on in two halves, a and b, which are the pairs that turn: its even and its odd channels, or its first
and its second half.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import MULTIPROCESSORS, add_partials, device_of, runs_of

_TILE = 1024  # values of a program
_RESIDENT_PROGRAMS = 4 * MULTIPROCESSORS  # of the backward pass, by its registers


@triton.jit
def load_pairs(starts, live, WIDTH: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # Both halves of the heads at `starts`, (ROWS, BLOCK) each; 0 beyond the width.
    if PAIRS:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.load(starts[:, None] + column, mask=live[:, None] & (column < WIDTH), other=0.0)
        a, b = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    else:
        half: tl.constexpr = (WIDTH + 1) // 2
        column = tl.arange(0, BLOCK)[None, :]
        a = tl.load(starts[:, None] + column, mask=live[:, None] & (column < half), other=0.0)
        b = tl.load(starts[:, None] + (half + column), mask=live[:, None] & (column < WIDTH - half), other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pairs(starts, a, b, live, WIDTH: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    if PAIRS:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.reshape(tl.join(a, b), (ROWS, 2 * BLOCK))
        tl.store(starts[:, None] + column, both, mask=live[:, None] & (column < WIDTH))
    else:
        half: tl.constexpr = (WIDTH + 1) // 2
        column = tl.arange(0, BLOCK)[None, :]
        tl.store(starts[:, None] + column, a, mask=live[:, None] & (column < half))
        tl.store(starts[:, None] + (half + column), b, mask=live[:, None] & (column < WIDTH - half))


@triton.jit
def row_sums(a, b):
    return tl.sum(a, axis=1) + tl.sum(b, axis=1)


@triton.jit
def normed_pairs(a, b, eps, WIDTH: tl.constexpr, CENTRED: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    # The heads, normed without a weight, and the reciprocals of their deviations.
    if CENTRED:
        mean = (row_sums(a, b) * (1.0 / WIDTH))[:, None]
        column = tl.arange(0, BLOCK)[None, :]
        first: tl.constexpr = (WIDTH + 1) // 2
        a = tl.where(column < first, a - mean, 0.0)
        b = tl.where(column < WIDTH - first, b - mean, 0.0)
    rstd = tl.rsqrt(row_sums(a * a, b * b) * (1.0 / WIDTH) + eps)
    return a * rstd[:, None], b * rstd[:, None], rstd


@triton.jit(do_not_specialize=["rows", "heads", "positions", "batch_stride", "position_stride"])
def forward_kernel(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    out,  # (tokens, 2, heads, WIDTH)
    rows,  # tokens * 2 * heads
    heads,
    positions,
    batch_stride,
    position_stride,
    eps,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    CENTRED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    short = row.to(tl.int32)  # launchers refuse 2^31 of them
    token = short // (2 * heads)
    slot = short - token * (2 * heads)
    sample = token // positions
    position = token - sample * positions
    starts = sample.to(tl.int64) * batch_stride + position.to(tl.int64) * position_stride
    starts = qkv + starts * VECTOR + slot * WIDTH
    a, b = load_pairs(starts, live, WIDTH, PAIRS, ROWS, BLOCK)
    if q_weight is not None:
        a, b, _ = normed_pairs(a, b, eps, WIDTH, CENTRED, PAIRS, BLOCK)
        keys = (slot >= heads)[:, None]
        one = tl.zeros((1,), tl.int32)
        q_a, q_b = load_pairs(q_weight + one, one == 0, WIDTH, PAIRS, 1, BLOCK)
        k_a, k_b = load_pairs(k_weight + one, one == 0, WIDTH, PAIRS, 1, BLOCK)
        a *= tl.where(keys, k_a, q_a)
        b *= tl.where(keys, k_b, q_b)
    if cos is not None:
        cos_a, cos_b = load_pairs(cos + position * WIDTH, live, WIDTH, PAIRS, ROWS, BLOCK)
        sin_a, sin_b = load_pairs(sin + position * WIDTH, live, WIDTH, PAIRS, ROWS, BLOCK)
        turned = a * cos_a - b * sin_a
        b = b * cos_b + a * sin_b
        a = turned
    store_pairs(out + row * WIDTH, a, b, live, WIDTH, PAIRS, ROWS, BLOCK)


@triton.jit
def value_of(slot, heads, q, k, v):
    # Of the three, that of a slot's kind.
    return tl.where(slot < heads, q, tl.where(slot < 2 * heads, k, v))


@triton.jit(
    do_not_specialize=[
        "tokens", "run", "parts", "heads", "positions", "batch_stride", "position_stride",
        *(f"{kind}_{stride}" for kind in "qkv" for stride in ("batch", "head", "position")),
    ]
)  # fmt: skip
def backward_kernel(
    d_q,
    d_k,
    d_v,
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    d_qkv,  # (tokens, 3, heads, WIDTH)
    d_weights,  # (2, parts, heads, WIDTH)
    d_bias,  # (parts, 3, heads, WIDTH)
    tokens,
    run,
    parts,
    heads,
    positions,
    q_batch,
    q_head,
    q_position,
    k_batch,
    k_head,
    k_position,
    v_batch,
    v_head,
    v_position,
    batch_stride,
    position_stride,
    eps,
    VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
    CENTRED: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program has one of the 3 * heads heads and a run of tokens, ROWS of them at a time.
    slot = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    kind = slot // heads
    head = slot - kind * heads
    gradient = d_q
    if kind == 1:
        gradient = d_k
    if kind == 2:
        gradient = d_v
    batch = value_of(slot, heads, q_batch, k_batch, v_batch).to(tl.int64)
    step = value_of(slot, heads, q_position, k_position, v_position).to(tl.int64)
    gradient += head * value_of(slot, heads, q_head, k_head, v_head).to(tl.int64) * GRAD_VECTOR
    end = tl.minimum((part + 1) * run, tokens.to(tl.int64))
    bias_a = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_b = tl.zeros((ROWS, BLOCK), tl.float32)
    weight_a = tl.zeros((ROWS, BLOCK), tl.float32)
    weight_b = tl.zeros((ROWS, BLOCK), tl.float32)
    done = 0
    while done < run:  # not range(): the interpreter of Triton 3.6 cannot count to a tensor beside numpy 2.4
        token = part * run + done + tl.arange(0, ROWS)
        done += ROWS
        live = token < end
        short = token.to(tl.int32)
        sample = short // positions
        position = short - sample * positions
        starts = gradient + (sample.to(tl.int64) * batch + position.to(tl.int64) * step) * GRAD_VECTOR
        a, b = load_pairs(starts, live, WIDTH, PAIRS, ROWS, BLOCK)
        if kind < 2:
            if cos is not None:
                cos_a, cos_b = load_pairs(cos + position * WIDTH, live, WIDTH, PAIRS, ROWS, BLOCK)
                sin_a, sin_b = load_pairs(sin + position * WIDTH, live, WIDTH, PAIRS, ROWS, BLOCK)
                back = a * cos_a + b * sin_b
                b = b * cos_b - a * sin_a
                a = back
            if q_weight is not None:
                starts = sample.to(tl.int64) * batch_stride + position.to(tl.int64) * position_stride
                starts = qkv + starts * VECTOR + slot * WIDTH
                x_a, x_b = load_pairs(starts, live, WIDTH, PAIRS, ROWS, BLOCK)
                x_a, x_b, rstd = normed_pairs(x_a, x_b, eps, WIDTH, CENTRED, PAIRS, BLOCK)
                if d_weights is not None:
                    weight_a += tl.where(live[:, None], a * x_a, 0.0)
                    weight_b += tl.where(live[:, None], b * x_b, 0.0)
                weight = q_weight
                if kind == 1:
                    weight = k_weight
                one = tl.zeros((1,), tl.int32)
                w_a, w_b = load_pairs(weight + one, one == 0, WIDTH, PAIRS, 1, BLOCK)
                a *= w_a
                b *= w_b
                along = (row_sums(a * x_a, b * x_b) * (1.0 / WIDTH))[:, None]
                mean_a = x_a * along
                mean_b = x_b * along
                if CENTRED:
                    mean = (row_sums(a, b) * (1.0 / WIDTH))[:, None]
                    mean_a += mean
                    mean_b += mean
                a = (a - mean_a) * rstd[:, None]
                b = (b - mean_b) * rstd[:, None]
        starts = d_qkv + token * (3 * heads * WIDTH) + slot * WIDTH
        store_pairs(starts, a, b, live, WIDTH, PAIRS, ROWS, BLOCK)
        if d_bias is not None:
            bias_a += tl.where(live[:, None], a, 0.0)
            bias_b += tl.where(live[:, None], b, 0.0)
    one = tl.zeros((1,), tl.int32)
    if d_bias is not None:
        starts = d_bias + (part * 3 * heads + slot) * WIDTH + one
        total_a, total_b = tl.sum(bias_a, axis=0)[None, :], tl.sum(bias_b, axis=0)[None, :]
        store_pairs(starts, total_a, total_b, one == 0, WIDTH, PAIRS, 1, BLOCK)
    if d_weights is not None:
        starts = d_weights + ((kind * parts + part) * heads + head) * WIDTH + one
        total_a, total_b = tl.sum(weight_a, axis=0)[None, :], tl.sum(weight_b, axis=0)[None, :]
        store_pairs(starts, total_a, total_b, (one == 0) & (kind < 2), WIDTH, PAIRS, 1, BLOCK)


def _strides(tensors: list[Tensor], dims: tuple[int, ...]) -> tuple[list[int], int]:
    """Strides of all tensors in the same vectors, and the elements of one."""
    strides = [tensor.stride(dim) for tensor in tensors for dim in dims]
    elements = 16 // tensors[0].element_size()
    vector = elements if all(stride % elements == 0 for stride in strides) else 1
    return [stride // vector for stride in strides], vector


def _rows_of(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _block(width: int) -> int:
    return triton.next_power_of_2(triton.cdiv(width, 2))


def forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
    centred: bool,
    interleaved: bool,
) -> Tensor:
    """Launch the forward pass; see op.py for arguments and result."""
    batch, positions, all_channels = qkv.shape
    width = all_channels // (3 * heads)
    out = qkv.new_empty((batch, positions, 2 * heads * width))
    if out.numel() == 0:
        return out
    qkv = _rows_of(qkv)
    (batch_stride, position_stride), vector = _strides([qkv], (0, 1))
    rows, block = batch * positions * 2 * heads, _block(width)
    if rows > 2**31 - 1:
        raise RuntimeError("layersync_kernels: qk_norm_rope on too large a tensor")
    tile = max(_TILE // (2 * block), 1)
    with device_of(qkv):
        forward_kernel[(triton.cdiv(rows, tile),)](
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            out,
            rows,
            heads,
            positions,
            batch_stride,
            position_stride,
            eps,
            VECTOR=vector,
            WIDTH=width,
            CENTRED=centred,
            PAIRS=interleaved and width % 2 == 0,
            ROWS=tile,
            BLOCK=block,
            num_warps=4,
        )
    return out


def backward(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    qkv: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    centred: bool,
    interleaved: bool,
    weights: bool,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward pass; see op.py for arguments and results."""
    batch, heads, positions, width = d_q.shape
    tokens, slots = batch * positions, 3 * heads
    d_qkv = d_q.new_empty((batch, positions, slots * width))
    d_weights = d_q.new_empty((2, width) if weights else (0,), dtype=torch.float32)
    d_bias = d_q.new_empty((slots * width if bias else 0,), dtype=torch.float32)
    if d_qkv.numel() == 0:
        return d_qkv, d_weights.zero_(), d_bias.zero_()
    if tokens * slots > 2**31 - 1:
        raise RuntimeError("layersync_kernels: qk_norm_rope on too large a tensor")
    gradients = [_rows_of(gradient) for gradient in (d_q, d_k, d_v)]
    strides, grad_vector = _strides(gradients, (0, 1, 2))
    qkv = None if qkv is None else _rows_of(qkv)
    (batch_stride, position_stride), vector = ([0, 0], 1) if qkv is None else _strides([qkv], (0, 1))
    block = _block(width)
    tile = max(_TILE // (2 * block), 1)
    run, parts = runs_of(tokens, slots, _RESIDENT_PROGRAMS)
    weight_sums = d_weights.new_empty((1, 2, parts * heads, width)) if weights else None
    bias_sums = d_bias.new_empty((1, 1, parts, slots * width)) if bias and parts > 1 else None
    with device_of(d_q):
        backward_kernel[(slots, parts)](
            *gradients,
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            d_qkv,
            weight_sums,
            (d_bias if bias_sums is None else bias_sums) if bias else None,
            tokens,
            run,
            parts,
            heads,
            positions,
            *strides,
            batch_stride,
            position_stride,
            eps,
            VECTOR=vector,
            GRAD_VECTOR=grad_vector,
            WIDTH=width,
            CENTRED=centred,
            PAIRS=interleaved and width % 2 == 0,
            ROWS=tile,
            BLOCK=block,
            num_warps=4,
        )
        if bias_sums is not None:
            add_partials(bias_sums, [d_bias.unsqueeze(0)])
        if weight_sums is not None:
            add_partials(weight_sums, [d_weights])
    return d_qkv, d_weights, d_bias
