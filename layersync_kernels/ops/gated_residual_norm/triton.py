"""gated_residual_norm in Triton: how its kernels are launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..tiles import (
    MULTIPROCESSORS,
    Tile,
    add_partials,
    device_of,
    operand,
    runs_of,
    smallest_square,
    tile_for,
)
from .triton_kernels import backward_kernel, forward_kernel

_RESIDENT_WARPS = 8 * MULTIPROCESSORS  # of the backward pass, by its registers


def run_tile_for(width: int) -> Tile:
    """Choose the launch of the backward pass by the width of the rows alone.

    Four sums and up to four tensors are in registers: at most 24 channels of each per thread, up to 12,288 channels. Of
    4096 channels 8 warps would take so many registers that a multiprocessor had room for one program, and idled at the
    barriers of its sums; 16 have as many threads, and one tile.
    """
    warps = min(triton.next_power_of_2(triton.cdiv(max(width, 1), 384 if 3072 < width <= 4096 else 768)), 16)
    block = min(triton.next_power_of_2(max(width, 1)), 256 * warps)
    return Tile(max(256 // block, 1), max(block, triton.next_power_of_2(triton.cdiv(width, 32))), warps)


def _modulations(*tensors: Tensor | None) -> tuple[list[Tensor | None], list[int], int, int]:
    """The (G, D) tensors as a kernel takes them, their strides in vectors, the elements of a vector, and G."""
    operands = [operand(tensor) for tensor in tensors]
    given = [o for o in operands if o.tensor is not None]
    vector = min((o.vector for o in given), default=1)
    strides = [o.layout[2] * o.vector // vector for o in operands]
    groups = max((o.tensor.shape[0] for o in given if o.tensor is not None), default=1)
    return [o.tensor for o in operands], strides, vector, groups


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    student: Tensor | None,
    norm: bool,
    rms: bool,
    eps: float,
    align_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward pass; see op.py for arguments and results."""
    width = x.shape[-1]
    rows = x.numel() // width
    residual = x.new_empty((0,) if branch is None else x.shape)
    normed = x.new_empty(x.shape if norm else (0,), dtype=dtype)
    stats = x.new_empty((2, rows) if norm else (0,), dtype=torch.float32)
    alignment = x.new_empty((0,) if student is None else (3, rows), dtype=torch.float32)
    if rows == 0:
        return residual, normed, stats, alignment
    x_rows, branch_rows, student_rows = operand(x), operand(branch), operand(student)
    modulations, strides, vector, groups = _modulations(gate, shift, scale)
    tile = tile_for(width)
    with device_of(x):
        forward_kernel[(triton.cdiv(rows, tile.rows),)](
            x_rows.tensor,
            branch_rows.tensor,
            *modulations,
            student_rows.tensor,
            None if branch is None else residual,
            normed if norm else None,
            stats if norm else None,
            None if student is None else alignment,
            rows,
            rows // groups,
            *x_rows.layout,
            *branch_rows.layout,
            *student_rows.layout,
            *strides,
            eps,
            align_eps,
            smallest_square(align_eps),
            X_VECTOR=x_rows.vector,
            B_VECTOR=branch_rows.vector,
            S_VECTOR=student_rows.vector,
            M_VECTOR=vector,
            RMS=rms,
            WIDTH=width,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return residual, normed, stats, alignment


def backward(
    d_residual: Tensor | None,
    d_normed: Tensor | None,
    residual: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    stats: Tensor | None,
    other: Tensor | None,
    factors: Tensor | None,
    rms: bool,
    groups: int,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward pass; see op.py for arguments and results."""
    width = residual.shape[-1]
    rows = residual.numel() // width
    moved = d_normed is not None or other is not None
    summed = (groups > 0 and gate is not None, *(groups > 0 and d_normed is not None,) * 2, bias)
    d_x = residual.new_empty(residual.shape if moved else (0,))
    half = next((x for x in (branch, d_normed) if x is not None), residual)
    d_branch = half.new_empty((0,) if branch is None else branch.shape)
    sums = [residual.new_empty((groups, width) if wanted else (0,), dtype=torch.float32) for wanted in summed]
    if rows == 0:
        return d_x, d_branch, sums[0].zero_(), sums[1].zero_(), sums[2].zero_(), sums[3].zero_()
    (gate, scale), strides, vector, modulated_groups = _modulations(gate, scale)
    groups = groups or modulated_groups
    tile = run_tile_for(width)
    run, parts = runs_of(rows // groups, groups, _RESIDENT_WARPS // tile.warps)
    wanted_sums = [total for total in sums if total.numel()]
    several = parts > 1 and len(wanted_sums) > 0
    partials = residual.new_empty((len(wanted_sums) if several else 0, groups, parts, width), dtype=torch.float32)
    targets = iter(partials if several else wanted_sums)
    operands = [operand(tensor) for tensor in (d_residual, d_normed, residual, branch, other)]
    names = ("D_VECTOR", "Y_VECTOR", "R_VECTOR", "B_VECTOR", "O_VECTOR")
    with device_of(residual):
        backward_kernel[(groups * parts,)](
            *(o.tensor for o in operands[:4]),
            gate,
            scale,
            stats,
            operands[4].tensor,
            None if factors is None else factors.contiguous(),
            d_x if moved else None,
            None if branch is None else d_branch,
            *(next(targets) if wanted else None for wanted in summed),
            rows,
            rows // groups,
            run,
            parts,
            *(number for o in operands for number in o.layout),
            *strides,
            **{name: o.vector for name, o in zip(names, operands, strict=True)},
            M_VECTOR=vector,
            RMS=rms,
            WIDTH=width,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
        if several:
            add_partials(partials, wanted_sums)
    return d_x, d_branch, sums[0], sums[1], sums[2], sums[3]
