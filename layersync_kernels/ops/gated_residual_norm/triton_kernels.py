# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment,var-annotated"
# ruff: noqa: ANN001, ANN201, ANN202, D103, RUF005 (Triton's compiler knows no unpacking)
"""The kernels of gated_residual_norm in Triton: one pass over the inputs forward, one backward.

Each optional part is a specialisation. Forward, a program takes a tile of rows, a warp for each up to 2048 channels,
and keeps them in registers between statistics and normalisation. Backward, a program takes a run of rows inside one
group, a few warps for each row, and keeps the sums over the run in registers too. Rows beyond 16,384 channels are
right, but spill.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import (
    cosine_of,
    fits,
    layout_names,
    load_tile,
    range_factor,
    row_offset,
    store_alignment,
    store_sums,
    store_tile,
)


@triton.jit
def _dots(student, teacher, live, s_factor, t_factor, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    ss = tl.zeros((ROWS, BLOCK), tl.float32)
    tt = tl.zeros((ROWS, BLOCK), tl.float32)
    st = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        s = load_tile(student, live, start, WIDTH, BLOCK).to(tl.float32) * s_factor
        t = teacher[start // BLOCK] * t_factor
        ss += s * s
        tt += t * t
        st += s * t
    return tl.sum(ss, axis=1), tl.sum(tt, axis=1), tl.sum(st, axis=1)


@triton.jit(
    do_not_specialize=["rows", "rows_per_group", "gate_stride", "shift_stride", "scale_stride", *layout_names("xbs")]
)
def forward_kernel(
    x,
    branch,
    gate,
    shift,
    scale,
    student,
    residual,
    normed,
    stats,
    alignment,
    rows,
    rows_per_group,
    x_inner,
    x_outer_stride,
    x_inner_stride,
    b_inner,
    b_outer_stride,
    b_inner_stride,
    s_inner,
    s_outer_stride,
    s_inner_stride,
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    align_eps,
    smallest,
    X_VECTOR: tl.constexpr,
    B_VECTOR: tl.constexpr,
    S_VECTOR: tl.constexpr,
    M_VECTOR: tl.constexpr,  # of gate, shift and scale
    RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    group = row // rows_per_group * M_VECTOR
    x += row_offset(row, rows, x_inner, x_outer_stride, x_inner_stride, X_VECTOR)
    if branch is not None:
        branch += row_offset(row, rows, b_inner, b_outer_stride, b_inner_stride, B_VECTOR)
    if gate is not None:
        gate += group * gate_stride

    tiles = ()
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        r = load_tile(x, inside, start, WIDTH, BLOCK).to(tl.float32)
        if branch is not None:
            update = load_tile(branch, inside, start, WIDTH, BLOCK).to(tl.float32)
            if gate is not None:
                update *= load_tile(gate, inside, start, WIDTH, BLOCK).to(tl.float32)
            r = (r + update).to(residual.dtype.element_ty).to(tl.float32)
        total += r
        tiles = tiles + (r,)

    if student is not None:
        student += row_offset(row, rows, s_inner, s_outer_stride, s_inner_stride, S_VECTOR)
        s_factor = tl.full((ROWS,), 1.0, tl.float32)
        t_factor = s_factor
        ss, tt, st = _dots(student, tiles, inside, 1.0, 1.0, WIDTH, ROWS, BLOCK)
        again = inside & ~(fits(ss, smallest) & fits(tt, smallest))
        if tl.max(again.to(tl.int32), axis=0) > 0:
            s_factor = tl.where(again, range_factor(ss), 1.0)
            t_factor = tl.where(again, range_factor(tt), 1.0)
            ss, tt, st = _dots(student, tiles, inside, s_factor[:, None], t_factor[:, None], WIDTH, ROWS, BLOCK)
        cosine, s_rnorm, t_rnorm = cosine_of(ss, tt, st, s_factor, t_factor, align_eps)
        store_alignment(alignment, row, rows, inside, cosine, s_rnorm, t_rnorm)

    if normed is not None:
        mean = tl.zeros((ROWS,), tl.float32)
        if not RMS:
            mean = tl.div_rn(tl.sum(total, axis=1), 1.0 * WIDTH)
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in tl.static_range(0, WIDTH, BLOCK):
            away = tiles[start // BLOCK]
            if not RMS:
                column = start + tl.arange(0, BLOCK)[None, :]
                away = tl.where(column < WIDTH, away - mean[:, None], 0.0)
            squares += away * away
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=1), 1.0 * WIDTH) + eps))
        tl.store(stats + row, mean, mask=inside)
        tl.store(stats + rows + row, rstd, mask=inside)
        normed += row * WIDTH
        if shift is not None:
            shift += group * shift_stride
        if scale is not None:
            scale += group * scale_stride
    if branch is not None:
        residual += row * WIDTH

    for start in tl.static_range(0, WIDTH, BLOCK):
        r = tiles[start // BLOCK]
        if branch is not None:
            store_tile(residual, r, inside, start, WIDTH, BLOCK)
        if normed is not None:
            y = (r - mean[:, None]) * rstd[:, None]
            if scale is not None:
                y *= 1.0 + load_tile(scale, inside, start, WIDTH, BLOCK).to(tl.float32)
            if shift is not None:
                y += load_tile(shift, inside, start, WIDTH, BLOCK).to(tl.float32)
            store_tile(normed, y, inside, start, WIDTH, BLOCK)


@triton.jit(
    do_not_specialize=[
        "rows",
        "rows_per_group",
        "run",
        "parts",
        "gate_stride",
        "scale_stride",
        *layout_names("dyrbo"),
    ]
)
def backward_kernel(
    d_residual,
    d_normed,
    residual,
    branch,
    gate,
    scale,
    stats,
    other,
    factors,
    d_x,
    d_branch,
    d_gate,  # sums over the run of each program, as the three below
    d_shift,
    d_scale,
    d_bias,
    rows,
    rows_per_group,
    run,
    parts,
    d_inner,
    d_outer_stride,
    d_inner_stride,
    y_inner,
    y_outer_stride,
    y_inner_stride,
    r_inner,
    r_outer_stride,
    r_inner_stride,
    b_inner,
    b_outer_stride,
    b_inner_stride,
    o_inner,
    o_outer_stride,
    o_inner_stride,
    gate_stride,
    scale_stride,
    D_VECTOR: tl.constexpr,
    Y_VECTOR: tl.constexpr,
    R_VECTOR: tl.constexpr,
    B_VECTOR: tl.constexpr,
    O_VECTOR: tl.constexpr,
    M_VECTOR: tl.constexpr,
    RMS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group = program // parts
    part = program - group * parts
    end = group * rows_per_group + tl.minimum((part + 1) * run, rows_per_group.to(tl.int64))
    everywhere = tl.full((1,), 1, tl.int1)
    if gate is not None:
        gate += tl.zeros((1,), tl.int64) + group * M_VECTOR * gate_stride
    if scale is not None:
        scale += tl.zeros((1,), tl.int64) + group * M_VECTOR * scale_stride

    gate_sums, shift_sums, scale_sums, update_sums = (), (), (), ()
    for _ in tl.static_range(0, WIDTH, BLOCK):
        nothing = tl.zeros((ROWS, BLOCK), tl.float32)
        if d_gate is not None:
            gate_sums = gate_sums + (nothing,)
        if d_scale is not None:
            shift_sums = shift_sums + (nothing,)
            scale_sums = scale_sums + (nothing,)
        if d_bias is not None:
            update_sums = update_sums + (nothing,)

    step = 0
    while step < run:  # not range(): the interpreter of Triton 3.6 cannot count to a tensor beside numpy 2.4
        row = group * rows_per_group + part * run + step + tl.arange(0, ROWS)
        live = row < end
        if d_residual is not None:
            d_residual_row = d_residual + row_offset(row, rows, d_inner, d_outer_stride, d_inner_stride, D_VECTOR)
        if d_normed is not None:
            d_normed_row = d_normed + row_offset(row, rows, y_inner, y_outer_stride, y_inner_stride, Y_VECTOR)
            rstd = tl.load(stats + rows + row, mask=live, other=0.0)[:, None]
            mean = tl.zeros((ROWS, 1), tl.float32)
            if not RMS:
                mean = tl.load(stats + row, mask=live, other=0.0)[:, None]
        if d_normed is not None or other is not None:
            residual_row = residual + row_offset(row, rows, r_inner, r_outer_stride, r_inner_stride, R_VECTOR)
        if branch is not None:
            branch_row = branch + row_offset(row, rows, b_inner, b_outer_stride, b_inner_stride, B_VECTOR)
        if other is not None:
            other_row = other + row_offset(row, rows, o_inner, o_outer_stride, o_inner_stride, O_VECTOR)
            other_factor = tl.load(factors + row, mask=live, other=0.0)[:, None]
            own_factor = tl.load(factors + rows + row, mask=live, other=0.0)[:, None]

        # All of the row is asked for before the first use of it, and before the first store, which no load can pass.
        direct_tiles, dy_tiles, r_tiles, branch_tiles, other_tiles = (), (), (), (), ()
        for start in tl.static_range(0, WIDTH, BLOCK):
            if d_normed is not None or other is not None:
                r_tiles = r_tiles + (load_tile(residual_row, live, start, WIDTH, BLOCK),)
            if d_normed is not None:
                dy_tiles = dy_tiles + (load_tile(d_normed_row, live, start, WIDTH, BLOCK),)
            if d_residual is not None:
                direct_tiles = direct_tiles + (load_tile(d_residual_row, live, start, WIDTH, BLOCK),)
            if other is not None:
                other_tiles = other_tiles + (load_tile(other_row, live, start, WIDTH, BLOCK),)
            if d_gate is not None:
                branch_tiles = branch_tiles + (load_tile(branch_row, live, start, WIDTH, BLOCK),)

        slope_tiles, new_shift_sums, new_scale_sums = (), (), ()
        if d_normed is not None:
            slopes = tl.zeros((ROWS, BLOCK), tl.float32)
            products = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in tl.static_range(0, WIDTH, BLOCK):
                slope = dy_tiles[start // BLOCK].to(tl.float32)
                unit = (r_tiles[start // BLOCK].to(tl.float32) - mean) * rstd
                if d_scale is not None:
                    new_shift_sums = new_shift_sums + (shift_sums[start // BLOCK] + slope,)
                    new_scale_sums = new_scale_sums + (scale_sums[start // BLOCK] + slope * unit,)
                if scale is not None:
                    slope *= 1.0 + load_tile(scale, everywhere, start, WIDTH, BLOCK).to(tl.float32)
                slopes += slope
                products += slope * unit
                slope_tiles = slope_tiles + (slope,)
            along = tl.sum(products, axis=1)[:, None] * (1.0 / WIDTH)
            if not RMS:
                level = tl.sum(slopes, axis=1)[:, None] * (1.0 / WIDTH)

        new_gate_sums, new_update_sums = (), ()
        for start in tl.static_range(0, WIDTH, BLOCK):
            dr = tl.zeros((ROWS, BLOCK), tl.float32)
            if d_residual is not None:
                dr = direct_tiles[start // BLOCK].to(tl.float32)
            if d_normed is not None or other is not None:
                r = r_tiles[start // BLOCK].to(tl.float32)
            if other is not None:
                dr += other_tiles[start // BLOCK].to(tl.float32) * other_factor + r * own_factor
            if d_normed is not None:
                slope = slope_tiles[start // BLOCK] - (r - mean) * rstd * along
                if not RMS:
                    slope -= level
                dr += slope * rstd
            if d_x is not None:
                store_tile(d_x + row * WIDTH, dr, live, start, WIDTH, BLOCK)
            if branch is not None:
                update = dr
                if gate is not None:
                    update = dr * load_tile(gate, everywhere, start, WIDTH, BLOCK).to(tl.float32)
                store_tile(d_branch + row * WIDTH, update, live, start, WIDTH, BLOCK)
            if d_gate is not None:
                new_gate_sums = new_gate_sums + (
                    gate_sums[start // BLOCK] + dr * branch_tiles[start // BLOCK].to(tl.float32),
                )
            if d_bias is not None:
                new_update_sums = new_update_sums + (update_sums[start // BLOCK] + dr,)
        gate_sums, shift_sums, scale_sums = new_gate_sums, new_shift_sums, new_scale_sums
        update_sums = new_update_sums
        step += ROWS

    for start in tl.static_range(0, WIDTH, BLOCK):
        if d_gate is not None:
            store_sums(d_gate + program * WIDTH, gate_sums[start // BLOCK], start, WIDTH, BLOCK)
        if d_scale is not None:
            store_sums(d_shift + program * WIDTH, shift_sums[start // BLOCK], start, WIDTH, BLOCK)
            store_sums(d_scale + program * WIDTH, scale_sums[start // BLOCK], start, WIDTH, BLOCK)
        if d_bias is not None:  # the sum of gate·dr
            update = update_sums[start // BLOCK]
            if gate is not None:
                update *= load_tile(gate, everywhere, start, WIDTH, BLOCK).to(tl.float32)
            store_sums(d_bias + program * WIDTH, update, start, WIDTH, BLOCK)
