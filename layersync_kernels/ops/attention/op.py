"""Self-attention over packed queries, keys and values on the CPU.

Story of the op: a thread takes a head, lays out its keys and values for the products, and works through the queries a
few rows at a time, whose scores stay in the cache and in fp32. In bf16 the products run on AVX-512's bf16 instructions
where there are any, in all other cases in fp32 arithmetic. Forward keeps qkv alone; backward computes the scores again
and writes the gradient of qkv itself, where autograd would stack three gradients and copy the result:

    P = softmax(q·kᵀ·scale),  dS = scale·P ∘ (dP − Σ P ∘ dP),  dP = d_out·vᵀ
    dq = dS·k,  dk = dSᵀ·q,  dv = Pᵀ·d_out

Of a sample with a length, tokens beyond it are neither read nor worked on: their rows are zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native, raw_op
from ..autograd import FusedFunction, differentiable_once
from ..registry import Op, register
from .reference import self_attention_reference


def _slower(backend: str) -> str | None:
    """Kernels beat torch's attention with AVX-512 and AVX2, at any shape and dtype; the portable loops do not.

    Torch's time by theirs, forward and backward together, on two cores of a Zen 4 EPYC with 16 to 4096 tokens and head
    widths 32 to 128: bf16 1.8 to 5.3, fp32 1.2 to 2.2, fp16 4.9 to 8.6. Held to AVX2, beside torch with AVX-512: 0.9 to
    1.5. The portable loops: 0.1.
    """
    portable = native.cpp().facts.cpu_isa() == "generic"
    return "the portable loops, all that this CPU can run, are slower than torch's attention" if portable else None


register(
    Op(
        "attention",
        ("self_attention",),
        self_attention_reference,
        backends=("cpp",),
        otherwise="torch's scaled_dot_product_attention",
        slower=_slower,
        uncompiled="it is one library call",
    )
)


def _fake_forward(qkv: Tensor, lengths: Tensor | None, heads: int) -> Tensor:
    batch, tokens, width = qkv.shape
    return qkv.new_empty((batch, tokens, width // 3))


def _fake_backward(d_out: Tensor, qkv: Tensor, lengths: Tensor | None, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


# qkv: (B, N, 3·heads·E) at any stride; lengths: contiguous int64 (B,), 0 to N. Returns the attention (B, N, heads·E),
# contiguous.
FORWARD = raw_op.declare("attention_forward", _fake_forward, kind="attention", backends=("cpp",), kept=True)
# d_out: (B, N, heads·E) of qkv's dtype, at any stride. Returns the gradient of qkv, contiguous.
BACKWARD = raw_op.declare("attention_backward", _fake_backward, kind="attention", backends=("cpp",))


class SelfAttention(FusedFunction):
    """The fused op with its gradient. Saves its inputs alone."""

    @staticmethod
    def forward(qkv: Tensor, lengths: Tensor | None, heads: int, backend: str) -> Tensor:
        """The raw op."""
        return FORWARD[backend](qkv, lengths, heads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward pass reads."""
        qkv, lengths, ctx.heads, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, lengths)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        """Gradient of qkv."""
        if d_out is None:
            return None, None, None, None
        qkv, lengths = ctx.saved_tensors
        d_qkv = BACKWARD[ctx.backend](d_out, qkv, lengths, ctx.heads)
        return differentiable_once(d_qkv, d_out, qkv), None, None, None


class UnpackHeads(FusedFunction):
    """Views (B, H, N, E) of queries, keys and values, whose gradients become one packed one in a single pass.

    Autograd's own way stacks them in one pass and turns the stack round in a second.
    """

    @staticmethod
    def forward(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """The views."""
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to keep."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Gradient of qkv."""
        return torch.stack([gradient.transpose(1, 2) for gradient in gradients], dim=2).flatten(2), None
