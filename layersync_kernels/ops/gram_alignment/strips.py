"""gram_alignment a strip of rows at a time: what all backends share.

With u = (s, t) the unit rows of student and teacher side by side, and v = (s, -t), the differences of their cosines are
one product, S - T = u·vᵀ: what it rounds is the difference, where the rounding of two cosines near 1 could be all that
is left of it. Being symmetric, a strip of its rows begins at its own diagonal block, and what lies to the right of that
block counts twice. With G the derivatives of the terms in strip I of the rows, the gradient of s is

    ds_I += 2 G s          over the columns of the strip,
    ds_J += 2 G_Jᵀ s_I     for the rows J below it, by the mirror image of G

and is made while the strip is in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .op import STRIP

_CHUNK = 1 << 18  # elements that are normalised at a time on a CPU: passes over them stay in the cache


class Cut(NamedTuple):
    """How the work is cut: strips of `height` rows, of `samples` samples at a time."""

    height: int
    samples: int


def cut(batch: int, tokens: int, cpu: bool) -> Cut:
    """Choose strips whose buffers stay in the cache; those of a CPU were measured from 64 to 512 rows.

    On a GPU few strips, as each is some 20 launches: at 512 rows, 8 strips of 3600 halves took an H100 1.7 ms,
    where the products are 0.1 by count.
    """
    rows, elements = (256, 1 << 19) if cpu else (2048, 1 << 24)
    height = min(rows, max(tokens, 1))
    return Cut(height, min(max(elements // (height * max(tokens, 1)), 1), max(batch, 1), 1 << 15))  # a grid's limit


def product_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype of the unit rows, of the differences and, on a GPU, of G.

    On a GPU the rows of half types become fp16, which for values up to 1 has eight times the resolution of bf16. On a
    CPU fp16 products are slow, and bf16 ones twice as fast as fp32.
    """
    dtypes = {student.dtype, teacher.dtype}
    if student.device.type != "cpu":
        return torch.float32 if torch.float32 in dtypes else torch.float16
    fast = dtypes == {torch.bfloat16} and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


class Strip(NamedTuple):
    """A strip of a group of samples; `gradient` is where G is written, or None."""

    u: Tensor  # (samples, height, D1 + D2)
    v: Tensor  # (samples, width, D1 + D2), of the columns
    difference: Tensor  # (samples, height, width), scratch memory
    gradient: Tensor | None  # the same shape
    margin: float
    kind: int


StripFunction = Callable[[Strip], Tensor]  # gives sums of the terms, (samples, ...)


def library_strip(op: Any) -> StripFunction:
    """Strips by a product of the library and a kernel behind it."""

    def strip(strip: Strip) -> Tensor:
        if strip.u.is_cuda or strip.v.is_contiguous():
            torch.bmm(strip.u, strip.v.mT, out=strip.difference)
        else:  # oneDNN copies the batch where samples do not follow each other without a gap
            for u, v, difference in zip(strip.u, strip.v, strip.difference, strict=True):
                torch.mm(u, v.mT, out=difference)
        return op(strip.difference, strip.u.shape[1], strip.margin, strip.kind, strip.gradient)

    return strip


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of (M, D) that one pass after another is made over."""
    rows, width = x.shape
    length = max(_CHUNK // max(width, 1), 1) if x.device.type == "cpu" else max(rows, 1)
    return (slice(first, first + length) for first in range(0, rows, length))


def _normalise(x: Tensor, mask: Tensor | None, eps: float, sign: int, *outputs: Tensor) -> Tensor:
    """Write the rows ±x / ‖x‖ of (M, D) into `outputs`; 1 / ‖x‖, (M, 1).

    Both are 0 for rows with ‖x‖ < eps and for those that the mask leaves out.
    """
    rnorm = x.new_empty((len(x), 1), dtype=torch.float32)
    for chunk in _chunks(x):
        part = x[chunk].float()
        # In fp64 the square of no fp32 value overflows or vanishes.
        norm = torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=torch.float64)
        rnorm[chunk] = norm.reciprocal().masked_fill_(norm < eps, 0)
        unit = part * (sign * rnorm[chunk])
        if mask is not None:
            unit.masked_fill_(~mask[chunk], 0)
            rnorm[chunk].masked_fill_(~mask[chunk], 0)
        for output in outputs:
            output[chunk] = unit
    return rnorm


def _pull_back(gradient: Tensor, unit: Tensor, factor: Tensor) -> None:
    """Turn the gradient of unit rows (M, D), in place, into that of the rows: (g - ⟨g, u⟩·u)·factor."""
    for chunk in _chunks(gradient):
        g, u = gradient[chunk], unit[chunk].float()
        along = torch.linalg.vecdot(g, u).unsqueeze(-1)
        g.addcmul_(u, along, value=-1).mul_(factor[chunk])


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a·b to `total`, which is fp32, or write it there if it is the first."""
    if a.dtype == total.dtype:
        total.baddbmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(torch.bmm(a, b, out_dtype=total.dtype))
    else:
        total += torch.bmm(a, b, out_dtype=total.dtype)


def run_cpp(*args: Any) -> tuple[Tensor, Tensor]:
    """Compute the raw op of op.py on the CPU."""
    return run(library_strip(STRIP["cpp"]), *args)


def run_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    """Compute the raw op of op.py on a GPU."""
    return run(library_strip(STRIP["cuda"]), *args)


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
    """Compute the raw op of op.py by strips. Memory beyond the inputs: O(N·D)."""
    *leading, tokens, width = student.shape
    batch, both, cpu = math.prod(leading), width + teacher.shape[-1], student.device.type == "cpu"
    dtype = product_dtype(student, teacher)
    rows = batch * tokens
    v = student.new_empty((batch, tokens, both), dtype=dtype)
    s, t = v[..., :width].flatten(0, 1), v[..., width:].flatten(0, 1)
    # G has three values for two of the kinds, but half types would round the sums: on a CPU they are sums in fp32.
    wide = s if dtype != torch.bfloat16 else s.new_empty(s.shape, dtype=torch.float32)
    wide_samples = wide.unflatten(0, (batch, tokens))
    ds = s.new_empty(wide_samples.shape if gradient else (0,), dtype=torch.float32)
    total = s.new_zeros(batch, dtype=torch.float64)
    valid = None if mask is None else mask.reshape(rows, 1)
    with torch.autocast(student.device.type, enabled=False):
        rnorm = _normalise(student.reshape(rows, width), valid, eps, 1, s, *([] if wide is s else [wide]))
        _normalise(teacher.reshape(rows, both - width), valid, eps, -1, t)
        height, samples = cut(batch, tokens, cpu)
        sign = v.new_ones(both)
        sign[width:] = -1
        buffers = [v.new_empty(samples * height * tokens)]
        if gradient:
            buffers.append(v.new_empty(len(buffers[0]), dtype=wide.dtype) if wide.dtype != dtype else buffers[0])
        for group in (slice(sample, sample + samples) for sample in range(0, batch, samples)):
            for first in range(0, tokens, height):
                last = min(first + height, tokens)
                columns = v[group, first:]
                u = columns[:, : last - first] * sign
                shape = (len(u), last - first, tokens - first)
                scratch = [buffer[: math.prod(shape)].view(shape) for buffer in buffers]
                g = scratch[1] if gradient else None
                sums = strip(Strip(u, columns, scratch[0], g, margin, kind))
                total[group] += sums.sum(dim=-1, dtype=torch.float64)
                if g is not None:
                    _accumulate(ds[group, first:last], g, wide_samples[group, first:], first == 0)
                    if last < tokens:
                        mirrored = g[:, :, last - first :].mT
                        _accumulate(ds[group, last:], mirrored, wide_samples[group, first:last], first == 0)
        count = total.new_full((batch,), tokens) if mask is None else mask.reshape(batch, tokens).sum(-1).double()
        pairs = count.square().clamp_(min=1)
        if gradient:
            scale = (2 / pairs).float().repeat_interleave(tokens, output_size=rows).unsqueeze(-1)
            _pull_back(ds.flatten(0, 1), wide, rnorm * scale)
    return (total / pairs).float().view(leading), ds.view(student.shape) if gradient else ds
