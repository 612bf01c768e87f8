"""projected_alignment: the cosine loss of z = h·Wᵀ + b and a constant teacher, z only ever a chunk of rows.

Story of the op: the GEMMs are the library's, and a chunk goes through the row kernels of cosine_alignment while it is
in the cache. Its loss needs nothing from other chunks, so dz is there as soon as z is, and with it the chunk's share of
all three gradients: forward and backward together cost the three GEMMs that eager takes too.

    dh = dz·W,    dW = Σ dzᵀ·h,    db = Σ dz    (sums over chunks in fp32)

On the CPU one kernel makes loss, dz in place of z and Σ dz. These are the gradients of −Σ w·c. The backward pass
multiplies them by the incoming one, and by 1/Σw for the mean: so small a factor would push those of fp16 below their
range before a loss scale has lifted them. On the CPU the other dtypes have it in dz already, and an incoming 1 costs no
pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import raw_op
from ..autograd import FusedFunction, differentiable_once, runs_eagerly
from ..cosine_alignment.op import BACKWARD, FORWARD, IN_PLACE, REDUCTIONS
from ..rows import as_rows

_NONE, _MEAN, _SUM = (REDUCTIONS[name] for name in ("none", "mean", "sum"))

# Bytes of z in a chunk. On the CPU (2 cores of a Zen 4, 1152 -> 768) dW wants few chunks: at 3 MB its GEMMs and the
# sums over chunks cost 4 % more. On a GPU the GEMMs have to fill the card: 8192 rows of 768 halves are 192 tiles of
# 128 x 256, for the 132 multiprocessors of an H100.
_CHUNK_BYTES = {"cpu": 9 << 20, "cuda": 12 << 20}
_FEWEST_ROWS = 256

# Up to here linear layer and fused cosine are at least as fast, and leave little memory to save.
_LINEAR_BYTES = {"cpu": 3 << 20, "cuda": 12 << 20}


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


def _project(
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


def _run(
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
    wanted = hidden_grad or weight_grad or bias_grad
    stored = True
    if backend == "triton" and hidden.dtype != torch.float32:
        from .triton import project

        stored = wanted
    else:  # in fp32 the library's GEMM is the better one
        project = functools.partial(_project, backend)
    shape, width = hidden.shape, weight.shape[0]
    tokens = min(as_rows(hidden).inner, as_rows(teacher).inner)
    hidden, teacher = _in_samples(hidden, tokens), _in_samples(teacher, tokens)
    samples = hidden.shape[0]
    d_hidden = hidden.new_empty((samples, tokens, shape[-1]) if hidden_grad else (0,))
    d_weight = weight.new_empty(weight.shape if weight_grad else (0,), dtype=torch.float32)
    d_bias = weight.new_empty((width if bias_grad else 0,), dtype=torch.float32)
    if row_weight is not None:
        row_weight = row_weight.view(samples, tokens)
    grad = torch.ones((), device=hidden.device) if grad is None else grad.reshape(samples, tokens)
    scale = _scale(row_weight, samples * tokens, reduction, hidden.device)
    in_place = backend == "cpp" and wanted
    early = 1.0
    if in_place and hidden.dtype != torch.float16:
        early, scale = scale.item(), torch.ones_like(scale)
    losses = []
    z: Tensor | None = None
    partial: Tensor | None = None
    for chunk in _chunks(samples, tokens, chunk_rows(width, hidden.dtype, hidden.device.type)):
        h, t = hidden[chunk].reshape(-1, shape[-1]), teacher[chunk]
        w = None
        if row_weight is not None:
            w = row_weight[chunk].reshape(-1)
            h = h.masked_fill((w == 0).unsqueeze(-1), 0)  # may hold NaN, and 0·NaN is not 0 in dW
        if z is None and stored:
            z = hidden.new_empty((h.shape[0], width))  # the first chunk is a largest one
        student = None if z is None else z[: h.shape[0]].view(t.shape)
        g = grad if grad.dim() == 0 else grad[chunk]
        if in_place:
            assert student is not None
            _linear(h, weight, bias, student)
            loss, sums = IN_PLACE["cpp"](student, t, w, g, eps, early, reduction and _SUM, bias_grad)
            dz = student
        else:
            loss, stats, ones = project(h, weight, bias, t, w, eps, reduction and _SUM, student)
            if wanted:
                dz, _ = BACKWARD[backend](g, student, t, w, stats, ones, True, False)
                sums = dz.view(-1, width).sum(dim=0) if bias_grad else d_bias  # in fp32 inside
        losses.append(loss)
        if not wanted:
            continue
        dz = dz.view(-1, width)
        first = len(losses) == 1
        if hidden_grad:
            torch.mm(dz, weight, out=d_hidden[chunk].view(h.shape))
        if weight_grad:
            if d_weight.dtype == h.dtype:
                d_weight.addmm_(dz.t(), h, beta=0 if first else 1)
            else:
                partial = torch.mm(dz.t(), h, out=partial)
                _accumulate(d_weight, partial, first)
        if bias_grad:
            sums = sums.view(-1)
            d_bias.copy_(sums) if first else d_bias.add_(sums)
        del dz  # else it outlives its successor's birth, and two never share their memory
    loss = _reduce(losses, scale * early, reduction)
    loss = loss.view(shape[:-1] if reduction == _NONE else ())
    return loss, scale, d_hidden.view(shape if hidden_grad else (0,)), d_weight, d_bias


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


def _fake(
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
    def empty(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    return (
        empty(*(hidden.shape[:-1] if reduction == _NONE else ())),
        empty(),
        hidden.new_empty(hidden.shape if hidden_grad else (0,)),
        empty(*(weight.shape if weight_grad else (0,))),
        empty(weight.shape[0] if bias_grad else 0),
    )


# hidden: (..., D), weight: (P, D) and bias: (P,) of one dtype, teacher: (..., P), row_weight: (M,) contiguous float32,
# grad: (...) of the loss for reduction "none", else None for one; neither M, D nor P is 0. Returns the loss;
# what is left to multiply the gradients by; those of hidden, weight and bias, the latter two in float32, or (0,) where
# not wanted. For the mean that factor is 1/Σw, unless it is in the gradients already.
RUN = raw_op.declare(
    "projected_alignment",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher, Tensor? row_weight, Tensor? grad, float eps, "
    "int reduction, bool hidden_grad, bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    functools.partial(_run, "triton"),
)
torch.library.impl("layersync_cpp::projected_alignment", "cpu")(functools.partial(_run, "cpp"))
torch.library.impl("layersync_cuda::projected_alignment", "cuda")(functools.partial(_run, "cuda"))


class ProjectedAlignment(FusedFunction):
    """The loss for hidden (..., D), weight (P, D), bias (P,) and teacher (..., P); saves these and the gradients."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Tensor,
        row_weight: Tensor | None,
        eps: float,
        reduction: int,
        hidden_grad: bool,
        weight_grad: bool,
        bias_grad: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the raw op returns. The gradients of "none" depend on the incoming one, and are left to backward."""
        now = reduction != _NONE
        return RUN[backend](
            hidden, weight, bias, teacher, row_weight, None, eps, reduction,
            hidden_grad and now, weight_grad and now, bias_grad and now,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the gradients: where Python has a say, in the context itself, from where backward takes them away."""
        *tensors, ctx.eps, ctx.reduction, hidden_grad, weight_grad, bias_grad, ctx.backend = inputs
        ctx.wanted = (hidden_grad, weight_grad, bias_grad)
        ctx.dtype = inputs[1].dtype
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.eager = runs_eagerly()
        if ctx.eager:
            ctx.kept = output[1:]
            ctx.save_for_backward(*tensors)
        else:
            ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias, as far as wanted."""
        if grad is None or not any(ctx.wanted):
            return (None,) * 11
        if ctx.reduction == _NONE:
            gradients = list(_recompute(ctx, grad)[1:])
        else:
            if not ctx.eager:
                scale, *gradients = ctx.saved_tensors[5:]
            elif ctx.kept is None:  # a second backward pass over a retained graph
                scale, *gradients = _recompute(ctx, None)
            else:
                (scale, *gradients), ctx.kept = ctx.kept, None
            gradients = [_scaled(gradient, grad * scale, in_place=ctx.eager) for gradient in gradients]
        d_hidden, d_weight, d_bias = (g if wanted else None for g, wanted in zip(gradients, ctx.wanted, strict=True))
        d_weight = None if d_weight is None else d_weight.to(ctx.dtype)
        d_bias = None if d_bias is None else d_bias.to(ctx.dtype)
        results: list[Tensor | None] = [d_hidden, d_weight, d_bias]
        if torch.is_grad_enabled() and ctx.eager:  # create_graph: other passes need not unpack what was saved
            inputs = [x for x in ctx.saved_tensors[:3] if x is not None]
            results = [None if g is None else differentiable_once(g, grad, *inputs) for g in results]
        return *results, *[None] * 8


def _recompute(ctx: Any, grad: Tensor | None) -> tuple[Tensor, ...]:
    with torch.no_grad():  # under create_graph
        return RUN[ctx.backend](*ctx.saved_tensors[:5], grad, ctx.eps, ctx.reduction, *ctx.wanted)[1:]


def _scaled(gradient: Tensor, factor: Tensor, *, in_place: bool) -> Tensor:
    """Multiply by a 0-d fp32 factor, unrounded: on a GPU, one without dimensions would be rounded to a half type."""
    if not in_place:
        return (gradient * factor.view(1)).to(gradient.dtype)
    if factor.device.type == "cpu" and factor.item() == 1:
        return gradient
    return gradient.mul_(factor.view(1) if gradient.is_cuda else factor)


def projected_alignment(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Tensor,
    row_weight: Tensor | None,
    eps: float,
    reduction: str,
    backend: str,
) -> Tensor:
    """Run the fused op on a resolved backend. Arguments as the reference's, but row_weight (M,) float32."""
    grad = torch.is_grad_enabled()
    wanted = (grad and x is not None and x.requires_grad for x in (hidden, weight, bias))
    loss, *_ = ProjectedAlignment.run(
        hidden, weight, bias, teacher, row_weight, eps, REDUCTIONS[reduction], *wanted, backend
    )
    return loss
