"""Norm and rotary positions of queries and keys, in one pass over the packed projection.

Story of the op: forward reads the queries and keys of qkv and writes them normed and turned; v stays a view. It keeps
qkv, and nothing where there is no norm. Backward turns the gradients back, computes the statistics of each head again
from what it reads anyway, and writes the packed gradient of qkv, that of v with it, and the sums over tokens for the
weights and for the bias of the projection before it.

With x̂ = (x − mean)·rstd, or x·rstd without the mean, and g the gradient of the normed head, turned back:

    d_weight = Σ g·x̂,  dx = rstd·(g·w − x̂·mean(g·w·x̂) [− mean(g·w)])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import raw_op
from ..autograd import FusedFunction, differentiable_once
from ..registry import Op, register
from .reference import qk_norm_rope_reference

MAX_WIDTH = 256
"""Channels of a head that the kernels take; those of FlashAttention."""

register(Op("qk_norm_rope", ("qk_norm_rope",), qk_norm_rope_reference, uncompiled=None))


def _fake_forward(
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
    batch, tokens, width = qkv.shape
    return qkv.new_empty((batch, tokens, width // 3 * 2))


def _fake_backward(
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
    batch, heads, tokens, width = d_q.shape
    return (
        d_q.new_empty((batch, tokens, 3 * heads * width)),
        d_q.new_empty((2, width) if weights else (0,), dtype=torch.float32),
        d_q.new_empty((3 * heads * width if bias else 0,), dtype=torch.float32),
    )


# qkv: (B, N, 3·heads·E) at any stride, E up to MAX_WIDTH; weights: (E,), cos and sin: (N, E), contiguous float32, None
# where there is no norm, or no rotation. Returns queries and keys (B, N, 2·heads·E), contiguous.
FORWARD = raw_op.declare("qk_norm_rope_forward", _fake_forward, kind="rows", python={"triton": "triton:forward"})
# d_q, d_k, d_v: (B, heads, N, E) of one dtype, at any stride; qkv: None without a norm; the rest as forward took it.
# Returns, contiguous: the gradient of qkv; the gradients of both weights (2, E) and the column sums of the first one
# (3·heads·E,), unrounded, in float32, or (0,) where not wanted.
BACKWARD = raw_op.declare("qk_norm_rope_backward", _fake_backward, kind="rows", python={"triton": "triton:backward"})


class QkNormRope(FusedFunction):
    """The fused op with its gradient. Saves its inputs alone, and qkv only where there is a norm."""

    @staticmethod
    def forward(
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        bias: Tensor | None,
        heads: int,
        eps: float,
        centred: bool,
        interleaved: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of the raw op, and the view of the values, each (B, H, N, E)."""
        weights = [None if weight is None else weight.float() for weight in (q_weight, k_weight)]
        out = FORWARD[backend](qkv, *weights, cos, sin, heads, eps, centred, interleaved)
        q, k = out.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        v = qkv.unflatten(-1, (3, heads, -1))[:, :, 2].transpose(1, 2)
        return q, k, v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the backward pass reads."""
        qkv, q_weight, k_weight, cos, sin, bias, _, ctx.eps, ctx.centred, ctx.interleaved, ctx.backend = inputs
        ctx.save_for_backward(None if q_weight is None else qkv, q_weight, k_weight, cos, sin)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of qkv, both weights and the bias."""
        qkv, *weights, cos, sin = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        floats = [None if weight is None else weight.float() for weight in weights]
        d_qkv, d_weights, d_bias = BACKWARD[ctx.backend](
            d_q, d_k, d_v, qkv, *floats, cos, sin, ctx.eps, ctx.centred, ctx.interleaved, any(wanted[1:3]), wanted[5]
        )
        saved = [tensor for tensor in (d_q, d_k, d_v, qkv, *weights) if tensor is not None]

        def once(gradient: Tensor) -> Tensor:
            return differentiable_once(gradient, *saved)

        return (
            once(d_qkv) if wanted[0] else None,
            *(
                once(d_weights[kind].to(weight.dtype)) if wanted[1 + kind] else None
                for kind, weight in enumerate(weights)
            ),
            None,
            None,
            once(d_bias.to(ctx.bias_dtype)) if wanted[5] else None,
            *(None,) * 5,
        )


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    bias: Tensor | None,
    heads: int,
    eps: float,
    centred: bool,
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the fused op on a resolved backend; the arguments are those of the reference."""
    results: tuple[Tensor, Tensor, Tensor] = QkNormRope.run(
        qkv, q_weight, k_weight, cos, sin, bias, heads, eps, centred, interleaved, backend
    )
    return results
