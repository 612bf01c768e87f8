"""Multi-head self-attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops import dispatch
from ..ops.attention import SelfAttention, UnpackHeads, self_attention_reference
from ..ops.autograd import transform
from .checks import check_tokens


def self_attention(qkv: Tensor, num_heads: int, backend: str = "auto") -> Tensor:
    """Multi-head self-attention, softmax(q·kᵀ / √E)·v over all tokens, without mask or dropout.

    Args:
        qkv: (B, N, 3·H·E), laid out [3, H, E] in the last dimension as a joint projection leaves it; any strides;
            float32, bfloat16 or float16, and float64 through torch's own.
        num_heads: H.
        backend: "auto" takes the C++ kernels where they are the faster ones; "cpp" takes them; "reference" is torch's
            `scaled_dot_product_attention`. There are no kernels for a GPU.

    Returns:
        (B, N, H·E) of qkv's dtype.

    Raises:
        ValueError: qkv that is not three-dimensional, or whose last dimension is not a multiple of 3·H.
        TypeError: a tensor that is not dense or not floating point.
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
    name = dispatch.resolve("self_attention", backend, qkv.device.type, qkv.dtype, tokens=qkv, parts=3)
    if name == "reference":
        if transform() is not None:
            with sdpa_kernel(SDPBackend.MATH):  # the others have neither a batching rule nor forward derivatives
                return self_attention_reference(qkv, num_heads)
        out = F.scaled_dot_product_attention(*UnpackHeads.run(qkv, num_heads))
        return out.transpose(1, 2).flatten(2)
    return SelfAttention.run(qkv, num_heads, name)
