"""Self-attention on the CPU, over packed queries, keys and values or over three tensors.

Story of the op: a thread takes a head, lays out its keys and values for the products, and works through the queries a
few rows at a time, whose scores stay in the cache and in fp32. In bf16 the products run on AVX-512's bf16 instructions
where there are any, in all other cases in fp32 arithmetic. Forward keeps its inputs alone; backward computes the scores
again and writes the three gradients side by side, where autograd would stack them and copy the result, and their sums
over tokens, for the bias of the projection before:

    P = softmax(q·kᵀ·scale),  dS = scale·P ∘ (dP − Σ P ∘ dP),  dP = d_out·vᵀ
    dq = dS·k,  dk = dSᵀ·q,  dv = Pᵀ·d_out

Of a sample with a length, tokens beyond it are neither read nor worked on: their rows are zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch, native, raw_op
from ..autograd import FusedFunction, differentiable_once
from ..qk_norm_rope.op import BACKWARD as PACK
from ..qk_norm_rope.op import MAX_WIDTH
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
        ("self_attention", "attention"),
        self_attention_reference,
        backends=("cpp",),
        otherwise="torch's scaled_dot_product_attention",
        slower=_slower,
        uncompiled="it is one library call",
    )
)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, heads: int) -> Tensor:
    return q.new_empty(q.shape)


def _fake_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, heads: int, bias: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, width = q.shape
    d_qkv = q.new_empty((batch, tokens, 3 * width))
    return d_qkv, q.new_empty((3 * width if bias else 0,), dtype=torch.float32)


# q, k, v: (B, N, heads·E) of one dtype at any stride; lengths: contiguous int64 (B,), 0 to N. Returns the attention,
# like q, contiguous.
FORWARD = raw_op.declare("attention_forward", _fake_forward, kind="attention", backends=("cpp",), kept=True)
# d_out: like q, at any stride. Returns the gradients of q, k and v side by side (B, N, 3·heads·E), contiguous, and
# their sums over tokens before they are rounded, (3·heads·E,) float32, or (0,) where not wanted.
BACKWARD = raw_op.declare("attention_backward", _fake_backward, kind="attention", backends=("cpp",))


class SelfAttention(FusedFunction):
    """The fused op with its gradient, on packed queries, keys and values. Saves its inputs alone."""

    @staticmethod
    def forward(qkv: Tensor, lengths: Tensor | None, bias: Tensor | None, heads: int, backend: str) -> Tensor:
        """The raw op."""
        return FORWARD[backend](*qkv.chunk(3, dim=-1), lengths, heads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward pass reads."""
        qkv, lengths, bias, ctx.heads, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, lengths)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of qkv and of the bias."""
        if d_out is None:
            return (None,) * 5
        qkv, lengths = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2]
        parts = qkv.chunk(3, dim=-1)
        d_qkv, d_bias = BACKWARD[ctx.backend](d_out, *parts, lengths, ctx.heads, wanted)
        return (
            differentiable_once(d_qkv, d_out, qkv),
            None,
            differentiable_once(d_bias.to(ctx.bias_dtype), d_out, qkv) if wanted else None,
            None,
            None,
        )


class Attention(FusedFunction):
    """The fused op with its gradient, on queries, keys and values (B, H, N, E). Saves its inputs alone.

    The gradients are parts of one tensor (B, N, 3·H·E), as `qk_norm_rope` reads them without a copy.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, backend: str) -> Tensor:
        """The raw op."""
        return FORWARD[backend](*map(_side_by_side, (q, k, v)), lengths, q.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward pass reads."""
        *parts, lengths, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parts, lengths)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        if d_out is None:
            return (None,) * 5
        *parts, lengths = ctx.saved_tensors
        batch, heads, tokens, width = parts[0].shape
        packed, _ = BACKWARD[ctx.backend](d_out, *map(_side_by_side, parts), lengths, heads, False)
        gradients = packed.view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        return *(differentiable_once(gradient, d_out, *parts) for gradient in gradients), None, None


def _side_by_side(heads: Tensor) -> Tensor:
    """(B, H, N, E) → (B, N, H·E), a view of what lies so in memory."""
    return heads.transpose(1, 2).flatten(2)


class _UnpackHeads(FusedFunction):
    """See `unpack_heads`."""

    @staticmethod
    def forward(qkv: Tensor, bias: Tensor | None, heads: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """The views."""
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the sums of the bias take."""
        _, bias, _, ctx.backend = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of qkv and of the bias."""
        wanted = ctx.needs_input_grad[1]
        if wanted and ctx.backend not in dispatch.PLAIN:
            packed, _, sums = PACK[ctx.backend](*gradients, *[None] * 5, 1.0, False, True, False, True)
            d_qkv, d_bias = (differentiable_once(x, *gradients) for x in (packed, sums.to(ctx.bias_dtype)))
            return d_qkv, d_bias, None, None
        d_qkv = torch.stack([gradient.transpose(1, 2) for gradient in gradients], dim=2).flatten(2)
        if not wanted:
            return d_qkv, None, None, None
        return d_qkv, d_qkv.flatten(0, 1).sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype), None, None


def unpack_heads(qkv: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, H, N, E) of queries, keys and values, whose gradients become one packed one in a single pass.

    Autograd's own way stacks them in one pass and turns the stack round in a second. The sums for a bias that is part
    of qkv come with it where `qk_norm_rope` has a kernel.

    Args:
        qkv: (B, N, 3·H·E).
        bias: (3·H·E,), or None.
        heads: H.
    """
    backend = "reference"
    if bias is not None and qkv.shape[-1] // (3 * heads) <= MAX_WIDTH and qkv.numel() > 0:
        backend = dispatch.resolve("qk_norm_rope", "auto", qkv.device.type, qkv.dtype, tokens=qkv, parts=3)
    views: tuple[Tensor, Tensor, Tensor] = _UnpackHeads.run(qkv, bias, heads, backend)
    return views
