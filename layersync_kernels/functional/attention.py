"""Multi-head self-attention."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops import dispatch
from ..ops.attention import SelfAttention, UnpackHeads, masked_attention, self_attention_reference
from ..ops.autograd import transform
from .checks import check_lengths, check_tokens


def self_attention(qkv: Tensor, num_heads: int, backend: str = "auto", *, lengths: Tensor | None = None) -> Tensor:
    """Multi-head self-attention, softmax(q·kᵀ / √E)·v over all tokens, or over the first ones of each sample.

    Args:
        qkv: (B, N, 3·H·E), laid out [3, H, E] in the last dimension as a joint projection leaves it; any strides;
            float32, bfloat16 or float16, and float64 through torch's own.
        num_heads: H.
        backend: "auto" takes the C++ kernels where they are the faster ones; "cpp" takes them; "reference" is torch's
            `scaled_dot_product_attention`. There are no kernels for a GPU.
        lengths: int64 (B,), tokens of each sample that are there, 0 to N. The others are not attended to, and their
            rows of the result and of the gradient are 0. None: all are there. On a GPU the lengths become a mask, with
            which torch takes its memory-efficient kernel, and not FlashAttention.

    Returns:
        (B, N, H·E) of qkv's dtype.

    Raises:
        ValueError: qkv that is not three-dimensional, or whose last dimension is not a multiple of 3·H; lengths of
            another shape or device, or out of range (checked by the C++ kernels alone: elsewhere it would cost a
            synchronisation).
        TypeError: a tensor that is not dense or not floating point; lengths that are not int64.
        RuntimeError: a backend that was asked for and cannot run; double backward.
    """
    check_tokens("self_attention", "qkv", qkv)
    if qkv.dim() != 3:
        raise ValueError(f"self_attention: qkv must be (B, N, 3·H·E), got {tuple(qkv.shape)}")
    if num_heads < 1 or qkv.shape[-1] % (3 * num_heads) != 0:
        raise ValueError(
            f"self_attention: the last dimension of qkv must be 3 · {num_heads} heads · head width, got "
            f"{qkv.shape[-1]} in {tuple(qkv.shape)}"
        )
    if lengths is not None:
        check_lengths("self_attention", lengths, qkv)
    name = dispatch.resolve("self_attention", backend, qkv.device.type, qkv.dtype, tokens=qkv, parts=3)
    if name == "reference":
        if transform() is not None:
            with sdpa_kernel(SDPBackend.MATH):  # the others have neither a batching rule nor forward derivatives
                return self_attention_reference(qkv, num_heads, lengths)
        q, k, v = UnpackHeads.run(qkv, num_heads)
        out = masked_attention(q, k, v, lengths, lengths)
        return out.transpose(1, 2).flatten(2)
    return SelfAttention.run(qkv, lengths, num_heads, name)
