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

from typing import Any

import torch
from torch import Tensor

from .. import raw_op
from ..autograd import FusedFunction, differentiable_once, runs_eagerly
from ..cosine_alignment.op import REDUCTIONS
from ..registry import COMPOSITE, Op, register
from .reference import projected_alignment_reference

register(Op("projected_alignment", ("projected_alignment_loss",), projected_alignment_reference))

_NONE = REDUCTIONS["none"]


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
    _fake,
    kind=COMPOSITE,
    python={"cpp": "chunks:run_cpp", "cuda": "chunks:run_cuda", "triton": "chunks:run_triton"},
)


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
            # is_grads_batched maps over the backward pass of an eager call
            in_place = ctx.eager and not torch._C._functorch.is_legacy_batchedtensor(grad)
            gradients = [_scaled(gradient, grad * scale, in_place=in_place) for gradient in gradients]
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
