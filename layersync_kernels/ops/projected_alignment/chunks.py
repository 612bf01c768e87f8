"""projected_alignment a chunk of rows at a time: what all backends share.

The GEMMs are the library's; what stands between them is a kernel of cosine_alignment, or in Triton and a half type the
first GEMM's epilogue. See op.py for the story.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..cosine_alignment.op import BACKWARD, FORWARD, IN_PLACE, REDUCTIONS
from ..rows import as_rows

_NONE, _MEAN, _SUM = (REDUCTIONS[name] for name in ("none", "mean", "sum"))

# Bytes of z in a chunk. On the CPU (2 cores of a Zen 4, 1152 -> 768) dW wants few chunks: at 3 MB its GEMMs and the
# sums over chunks cost 4 % more. On a GPU launches cost more than what leaves the cache: at 12 MB, 65536 rows of 768
# halves in 8 chunks took an H100 1.9 ms forward, where the GEMMs are 0.5 by count; the card waited for the host.
_CHUNK_BYTES = {"cpu": 9 << 20, "cuda": 48 << 20}
_FEWEST_ROWS = 256

# Bytes of z up to which linear layer and fused cosine are at least as fast, and leave little memory to save.
_LINEAR_BYTES = {"cpu": 3 << 20, "cuda": 48 << 20}


def chunk_rows(z_width: int, dtype: torch.dtype, device: str) -> int:
    """How many rows a chunk has at most."""
    return max(_CHUNK_BYTES[device] // (z_width * dtype.itemsize), _FEWEST_ROWS)


def linear_rows(z_width: int, dtype: torch.dtype, device: str) -> int:
    """Up to how many rows `auto` takes linear layer and fused cosine."""
    return max(_LINEAR_BYTES[device] // (z_width * dtype.itemsize), _FEWEST_ROWS)


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> None:
    rows = z.view(-1, z.shape[-1])
    if bias is None:
        torch.mm(hidden, weight.t(), out=rows)
    else:
        torch.addmm(bias, hidden, weight.t(), out=rows)


def _two_steps(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    row_weight: Tensor | None,
    eps: float,
    reduction: int,
    z: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write z, of teacher's shape, and return what FORWARD makes of it."""
    _linear(hidden, weight, bias, z)
    return FORWARD[backend](z, teacher, row_weight, eps, reduction)


def _in_samples(tensor: Tensor, tokens: int) -> Tensor:
    """View a (..., W) tensor as (samples, tokens, W), or copy it where its strides do not allow that."""
    rows = as_rows(tensor)
    shape = (rows.count // tokens, tokens, rows.width)
    if rows.inner == rows.count:
        return rows.tensor.as_strided(shape, (tokens * rows.inner_stride, rows.inner_stride, 1))
    if rows.inner == tokens:
        return rows.tensor.as_strided(shape, (rows.outer_stride, rows.inner_stride, 1))
    return tensor.reshape(shape)


def _chunks(samples: int, tokens: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Cut (samples, tokens) into equal chunks of at most `limit` rows: of whole samples where those fit."""

    def cut(extent: int, most: int) -> list[slice]:
        parts = -(-extent // most)
        size = -(-extent // parts)
        return [slice(start, min(start + size, extent)) for start in range(0, extent, size)]

    if tokens <= limit:
        return ((part, slice(0, tokens)) for part in cut(samples, limit // tokens))
    return ((slice(sample, sample + 1), part) for sample in range(samples) for part in cut(tokens, limit))


class _Gradients:
    """The gradients of hidden (samples, tokens, D), weight and bias, added up over chunks; (0,) where not wanted.

    Those of weight and bias are fp32.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, hidden_grad: bool, weight_grad: bool, bias_grad: bool) -> None:
        self.hidden_grad, self.weight_grad, self.bias_grad = hidden_grad, weight_grad, bias_grad
        self.wanted = hidden_grad or weight_grad or bias_grad
        self.hidden = hidden.new_empty(hidden.shape if hidden_grad else (0,))
        self.weight = weight.new_empty(weight.shape if weight_grad else (0,), dtype=torch.float32)
        self.bias = weight.new_empty((weight.shape[0] if bias_grad else 0,), dtype=torch.float32)
        self._first = True
        self._partial: Tensor | None = None

    def add(self, chunk: tuple[slice, slice], h: Tensor, dz: Tensor, sums: Tensor, weight: Tensor) -> None:
        """What a chunk gives: its rows h (rows, D), the gradients dz (rows, P) of z, and the sums of those (P)."""
        if self.hidden_grad:
            torch.mm(dz, weight, out=self.hidden[chunk].view(h.shape))
        if self.weight_grad and self.weight.dtype == h.dtype:
            self.weight.addmm_(dz.t(), h, beta=0 if self._first else 1)
        elif self.weight_grad:
            self._partial = torch.mm(dz.t(), h, out=self._partial)
            _accumulate(self.weight, self._partial, self._first)
        if self.bias_grad:
            self.bias.copy_(sums.view(-1)) if self._first else self.bias.add_(sums.view(-1))
        self._first = False


def run(
    backend: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    row_weight: Tensor | None,
    grad: Tensor | None,
    eps: float,
    reduction: int,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the raw op of op.py, a chunk after the other."""
    shape, width = hidden.shape, weight.shape[0]
    tokens = min(as_rows(hidden).inner, as_rows(teacher).inner)
    hidden, teacher = _in_samples(hidden, tokens), _in_samples(teacher, tokens)
    samples = hidden.shape[0]
    gradients = _Gradients(hidden, weight, hidden_grad, weight_grad, bias_grad)
    project: Callable[..., tuple[Tensor, Tensor, Tensor]] = functools.partial(_two_steps, backend)
    keeps_z = True
    if backend == "triton" and hidden.dtype != torch.float32:  # in fp32 the library's GEMM is the better one
        from . import triton

        project, keeps_z = triton.project, gradients.wanted
    if row_weight is not None:
        row_weight = row_weight.view(samples, tokens)
    grad = torch.ones((), device=hidden.device) if grad is None else grad.reshape(samples, tokens)
    scale = _scale(row_weight, samples * tokens, reduction, hidden.device)
    in_place = backend == "cpp" and gradients.wanted
    scaled_already = in_place and hidden.dtype != torch.float16
    factor_of_dz = scale.item() if scaled_already else 1.0
    chunk_reduction = _NONE if reduction == _NONE else _SUM
    losses = []
    z: Tensor | None = None
    for chunk in _chunks(samples, tokens, chunk_rows(width, hidden.dtype, hidden.device.type)):
        h, t = hidden[chunk].reshape(-1, shape[-1]), teacher[chunk]
        w = None
        if row_weight is not None:
            w = row_weight[chunk].reshape(-1)
            h = h.masked_fill((w == 0).unsqueeze(-1), 0)  # may hold NaN, and 0·NaN is not 0 in dW
        if z is None and keeps_z:
            z = hidden.new_empty((h.shape[0], width))  # the first chunk is a largest one
        student = None if z is None else z[: h.shape[0]].view(t.shape)
        g = grad if grad.dim() == 0 else grad[chunk]
        if in_place:
            assert student is not None
            _linear(h, weight, bias, student)
            loss, sums = IN_PLACE["cpp"](student, t, w, g, eps, factor_of_dz, chunk_reduction, bias_grad)
            gradients.add(chunk, h, student.view(-1, width), sums, weight)
        else:
            loss, stats, ones = project(h, weight, bias, t, w, eps, chunk_reduction, student)
            if gradients.wanted:
                dz = BACKWARD[backend](g, student, t, w, stats, ones, True, False)[0].view(-1, width)
                sums = dz.sum(dim=0) if bias_grad else gradients.bias  # in fp32 inside
                gradients.add(chunk, h, dz, sums, weight)
                del dz  # else it outlives its successor's birth, and two never share their memory
        losses.append(loss)
    loss = _reduce(losses, scale, reduction).view(shape[:-1] if reduction == _NONE else ())
    left = torch.ones_like(scale) if scaled_already else scale
    return loss, left, gradients.hidden.view(shape if hidden_grad else (0,)), gradients.weight, gradients.bias


run_cpp, run_cuda, run_triton = (functools.partial(run, backend) for backend in ("cpp", "cuda", "triton"))


def _accumulate(total: Tensor, part: Tensor, first: bool) -> None:
    """Add a half type to fp32. The CPU makes a copy in fp32 for that, which should not be large."""
    for to, x in [(total, part)] if first or total.is_cuda else zip(total.chunk(8), part.chunk(8), strict=True):
        to.copy_(x) if first else to.add_(x)


def _scale(row_weight: Tensor | None, rows: int, reduction: int, device: torch.device) -> Tensor:
    """What the sum and its gradients are to be multiplied by."""
    if reduction != _MEAN:
        return torch.ones((), device=device)
    if row_weight is None:
        return torch.full((), 1 / rows, device=device)
    weights = row_weight.sum(dtype=torch.float64)
    return torch.where(weights == 0, 0, 1 / weights).to(torch.float32)


def _reduce(losses: list[Tensor], scale: Tensor, reduction: int) -> Tensor:
    if reduction == _NONE:
        return torch.cat([loss.view(-1) for loss in losses])
    total = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return torch.where(total == 0, 0, total * scale)
