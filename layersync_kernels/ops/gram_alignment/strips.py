"""gram_alignment a strip of rows at a time: what all backends share.

Both matrices are symmetric, so a strip of rows begins at its own diagonal block, and what lies to the right of that
block counts twice. With s the unit rows of the student, G = dL/dS and strip I of the rows, the gradient of s is

    ds_I += 2 G_I s        over the columns of the strip,
    ds_J += 2 G_IJᵀ s_I    for the rows J below it, the mirror image

Products are the library's (Triton makes S, T and G in one kernel), in fp32 on a CPU: with its bf16 products, which
round their results, the difference of two cosines near 1 would be noise. On a GPU the unit rows of half types are fp16,
which for values up to 1 has eight times the resolution of bf16, and results are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements that are normalised at a time on a CPU: passes over them stay in the cache


class Strips(NamedTuple):
    """How the work is cut: `height` rows of `samples` samples at a time."""

    height: int
    samples: int


def cut(tokens: int, batch: int, cpu: bool) -> Strips:
    """Choose strips: low enough that the diagonal blocks, which are computed in full, are a small part of the work."""
    least, most, elements = (64, 256, 1 << 19) if cpu else (128, 1024, 1 << 23)
    height = min(max(tokens // 8 // least * least, least), most, max(tokens, 1))
    return Strips(height, min(max(elements // (height * max(tokens, 1)), 1), max(batch, 1)))


class Strip(NamedTuple):
    """Unit rows (samples, height, D), unit rows of the columns (samples, width, D), and how the terms are made."""

    student: Tensor
    teacher: Tensor
    student_columns: Tensor
    teacher_columns: Tensor
    margin: float
    kind: int
    gradient: bool


class Buffers:
    """Scratch memory that strips use one after another."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size, self._device = size, device
        self._flat: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, in the memory of that name."""
        flat = self._flat.get(name)
        if flat is None:
            flat = self._flat[name] = torch.empty(self._size, dtype=dtype, device=self._device)
        return flat[: shape[0] * shape[1] * shape[2]].view(shape)


# (strip, buffers) → sums of terms (samples, ...), and G (samples, height, width), or None where it is not wanted
StripFunction = Callable[[Strip, Buffers], tuple[Tensor, Tensor | None]]


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a·b, summed in fp32."""
    if a.dtype == out.dtype:
        return torch.bmm(a, b, out=out)
    return torch.bmm(a, b, out_dtype=out.dtype, out=out)


def library_strip(op: Any) -> StripFunction:
    """Strips by two products of the library and a kernel behind them."""

    def strip(strip: Strip, buffers: Buffers) -> tuple[Tensor, Tensor | None]:
        samples, height, _ = strip.student.shape
        shape = (samples, height, strip.student_columns.shape[1])
        student, teacher = (buffers.get(name, shape, torch.float32) for name in ("student", "teacher"))
        product(strip.student, strip.student_columns.mT, student)
        product(strip.teacher, strip.teacher_columns.mT, teacher)
        gradient = None
        if strip.gradient:
            half = strip.student.dtype == torch.float16
            gradient = buffers.get("gradient", shape, torch.float16) if half else student
        return op(student, teacher, height, strip.margin, strip.kind, gradient), gradient

    return strip


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of (M, D) that one pass after another is made over."""
    rows = max(_CHUNK // max(x.shape[1], 1), 1) if x.device.type == "cpu" else max(len(x), 1)
    return (slice(first, first + rows) for first in range(0, len(x), rows))


def _unit_rows(x: Tensor, mask: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows x / ‖x‖ and 1 / ‖x‖; both 0 for rows with ‖x‖ < eps and for those that the mask leaves out."""
    batch, tokens, width = x.shape
    rows = x.reshape(batch * tokens, width)
    unit = rows.new_empty(rows.shape, dtype=dtype)
    rnorm = rows.new_empty((len(rows), 1), dtype=torch.float32)
    for chunk in _chunks(rows):
        part = rows[chunk].float()
        # In fp64 the squares of no fp32 value overflow or vanish.
        norm = torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=torch.float64)
        rnorm[chunk] = norm.reciprocal().masked_fill_(norm < eps, 0)
        torch.mul(part, rnorm[chunk], out=unit[chunk])
    if mask is not None:
        unmasked = ~mask.reshape(-1, 1)
        unit.masked_fill_(unmasked, 0)
        rnorm.masked_fill_(unmasked, 0)
    return unit.view(batch, tokens, width), rnorm.view(batch, tokens, 1)


def _pull_back(gradient: Tensor, unit: Tensor, factor: Tensor) -> None:
    """Turn the gradient of unit rows, in place, into that of the rows: (g - ⟨g, u⟩·u)·factor, factor = c / ‖x‖."""
    flat, unit, factor = (x.flatten(0, 1) for x in (gradient, unit, factor))
    for chunk in _chunks(flat):
        g, u = flat[chunk], unit[chunk].float()
        along = torch.linalg.vecdot(g, u).unsqueeze(-1)
        g.addcmul_(u, along, value=-1).mul_(factor[chunk])


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a·b to `total`."""
    if total.shape[1] == 0:
        return
    if a.dtype == total.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b, out_dtype=total.dtype)


@torch.no_grad()
def run(
    strip: StripFunction,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    margin: float,
    kind: int,
    eps: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the raw op of op.py by strips. (..., N, D) inputs; memory beyond them O(N·D)."""
    *leading, tokens, width = student.shape
    batch, cpu = math.prod(leading), student.device.type == "cpu"
    dtype = torch.float32 if cpu or torch.float32 in (student.dtype, teacher.dtype) else torch.float16
    with torch.autocast(student.device.type, enabled=False):
        s, rnorm = _unit_rows(student.reshape(batch, tokens, width), mask, eps, dtype)
        t, _ = _unit_rows(teacher.reshape(batch, tokens, teacher.shape[-1]), mask, eps, dtype)
        total = s.new_zeros(batch, dtype=torch.float64)
        ds = s.new_zeros(s.shape if gradient else (0,), dtype=torch.float32)
        height, samples = cut(tokens, batch, cpu)
        buffers = Buffers(samples * height * tokens, s.device)
        for sample in range(0, batch, samples):
            group = slice(sample, sample + samples)
            for first in range(0, tokens, height):
                last = min(first + height, tokens)
                rows, columns = s[group, first:last], s[group, first:]
                made = Strip(rows, t[group, first:last], columns, t[group, first:], margin, kind, gradient)
                sums, g = strip(made, buffers)
                total[group] += sums.sum(dim=-1, dtype=torch.float64)
                if g is not None:
                    _accumulate(ds[group, first:last], g, columns)
                    _accumulate(ds[group, last:], g[:, :, last - first :].mT, rows)
        count = total.new_full((batch,), tokens) if mask is None else mask.reshape(batch, tokens).sum(-1).double()
        pairs = count.square().clamp_(min=1)
        if gradient:
            _pull_back(ds, s, rnorm * (2 / pairs).float().view(-1, 1, 1))
        return (total / pairs).float().view(leading), ds.view(student.shape) if gradient else ds
