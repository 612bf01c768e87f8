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

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import raw_op
from ..autograd import FusedFunction, differentiable_once, runs_eagerly
from ..cosine_alignment.op import REDUCTIONS
from ..registry import COMPOSITE, Op, register
from .reference import projected_alignment_reference

register(
    Op(
        "projected_alignment",
        ("projected_alignment_loss",),
        projected_alignment_reference,
        uncompiled="it keeps the projected tokens that the op exists to avoid",
    )
)

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


class Inputs(NamedTuple):
    """What `ProjectedAlignment` takes, and in the same places the gradients."""

    hidden: Any
    weight: Any
    bias: Any
    teacher: Any = None
    row_weight: Any = None
    eps: Any = None
    reduction: Any = None
    hidden_grad: Any = None
    weight_grad: Any = None
    bias_grad: Any = None
    backend: Any = None


class Made(NamedTuple):
    """The results of the raw op but for the loss: a factor and, to be multiplied by it, the gradients."""

    scale: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor


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
        given = Inputs(*inputs)
        made = output[1:]
        tensors = given.hidden, given.weight, given.bias, given.teacher, given.row_weight
        ctx.eps, ctx.reduction, ctx.backend, ctx.dtype = given.eps, given.reduction, given.backend, given.weight.dtype
        ctx.wanted = given.hidden_grad, given.weight_grad, given.bias_grad
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        ctx.eager = runs_eagerly()
        ctx.kept = Made(*made) if ctx.eager else None
        ctx.save_for_backward(*tensors, *([] if ctx.eager else made))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias, as far as wanted."""
        hidden_wanted, weight_wanted, bias_wanted = ctx.wanted
        if grad is None or not any(ctx.wanted):
            return tuple(Inputs(None, None, None))
        if ctx.reduction == _NONE:
            made = _recompute(ctx, grad)
        else:
            made = _made_forward(ctx)
            # is_grads_batched maps over the backward pass of an eager call
            in_place = ctx.eager and not torch._C._functorch.is_legacy_batchedtensor(grad)
            factor = grad * made.scale
            on_host = ctx.backend == "cpp"
            made = Made(made.scale, *(_scaled(g, factor, in_place=in_place, on_host=on_host) for g in made[1:]))
        d_hidden = made.hidden if hidden_wanted else None
        d_weight = made.weight.to(ctx.dtype) if weight_wanted else None
        d_bias = made.bias.to(ctx.dtype) if bias_wanted else None
        if torch.is_grad_enabled() and ctx.eager:  # create_graph: other passes need not unpack what was saved
            inputs = [x for x in ctx.saved_tensors[:3] if x is not None]
            d_hidden, d_weight, d_bias = (
                None if gradient is None else differentiable_once(gradient, grad, *inputs)
                for gradient in (d_hidden, d_weight, d_bias)
            )
        return tuple(Inputs(d_hidden, d_weight, d_bias))  # Dynamo loses the gradients of a NamedTuple


def _made_forward(ctx: Any) -> Made:
    """What the forward pass has made; an eager context gives it away."""
    if not ctx.eager:
        return Made(*ctx.saved_tensors[5:])
    made, ctx.kept = ctx.kept, None
    return _recompute(ctx, None) if made is None else made  # a second backward pass over a retained graph


def _recompute(ctx: Any, grad: Tensor | None) -> Made:
    with torch.no_grad():  # under create_graph
        _, *made = RUN[ctx.backend](*ctx.saved_tensors[:5], grad, ctx.eps, ctx.reduction, *ctx.wanted)
    return Made(*made)


def _scaled(gradient: Tensor, factor: Tensor, *, in_place: bool, on_host: bool) -> Tensor:
    """Multiply by a 0-d fp32 factor, unrounded: on a GPU, one without dimensions would be rounded to a half type."""
    if not in_place:
        return (gradient * factor.view(1)).to(gradient.dtype)
    if on_host and factor.item() == 1:  # elsewhere, asking would wait for the device
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
