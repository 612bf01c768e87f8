"""Multi-head self-attention."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops import dispatch
from ..ops.attention import Attention, SelfAttention, masked_attention, self_attention_reference, unpack_heads
from ..ops.autograd import transform
from .checks import check_lengths, check_tokens, check_vector


def self_attention(
    qkv: Tensor,
    num_heads: int,
    backend: str = "auto",
    *,
    lengths: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
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
        bias: (3·H·E,), of any floating dtype: what the projection has added to qkv already. It changes no value:
            its gradient is that of qkv summed over tokens, which comes with the pass that writes that. Give it detached
            to the projection, or it counts twice.

    Returns:
        (B, N, H·E) of qkv's dtype.

    Raises:
        ValueError: qkv that is not three-dimensional, or whose last dimension is not a multiple of 3·H; lengths of
            another shape or device, or out of range (checked by the C++ kernels alone: elsewhere it would cost a
            synchronisation); a bias of another shape or device.
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
    if bias is not None:
        what = "the bias of the projection that made qkv"
        check_vector("self_attention", "bias", bias, "qkv", qkv, qkv.shape[-1:], what)
    name = dispatch.resolve("self_attention", backend, qkv.device.type, qkv.dtype, tokens=qkv, parts=3)
    if name == "reference":
        if transform() is not None:
            with sdpa_kernel(SDPBackend.MATH):  # the others have neither a batching rule nor forward derivatives
                return self_attention_reference(qkv, num_heads, lengths, bias)
        q, k, v = unpack_heads(qkv, bias, num_heads)
        out = masked_attention(q, k, v, lengths, lengths)
        return out.transpose(1, 2).flatten(2)
    return SelfAttention.run(qkv, lengths, bias, num_heads, name)


def attention(q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Multi-head self-attention of queries, keys and values that are three tensors, as `qk_norm_rope` gives them.

    The C++ kernels read them where they lie, with no copy where the heads of a token are neighbours, and write the
    three gradients side by side, as `qk_norm_rope` reads them.

    Args:
        q: (B, H, N, E), float32, bfloat16 or float16, and float64 through torch's own.
        k: like q.
        v: like q.
        lengths: as `self_attention` takes them.
        backend: as `self_attention` takes it.

    Returns:
        (B, N, H·E) of q's dtype.

    Raises:
        ValueError: tensors that are not four-dimensional, or differ in shape or device; lengths as in `self_attention`.
        TypeError: a tensor that is not dense or not floating point, or of another dtype than q; lengths that are not
            int64.
        RuntimeError: a backend that was asked for and cannot run; double backward.
    """
    check_tokens("attention", "q", q)
    if q.dim() != 4:
        raise ValueError(f"attention: q must be (B, H, N, E), got {tuple(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        check_tokens("attention", name, tensor, q, "q")
        if tensor.shape != q.shape:
            raise ValueError(f"attention: {name} {tuple(tensor.shape)} must have the shape of q, {tuple(q.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"attention: {name} is {tensor.dtype} and q {q.dtype}; cast one of them")
    if lengths is not None:
        check_lengths("attention", lengths, q[:, 0])
    name = dispatch.resolve("attention", backend, q.device.type, q.dtype, tokens=q, heads=q.shape[1])
    if name == "reference":
        if transform() is not None:
            with sdpa_kernel(SDPBackend.MATH):
                return masked_attention(q, k, v, lengths, lengths).transpose(1, 2).flatten(2)
        return masked_attention(q, k, v, lengths, lengths).transpose(1, 2).flatten(2)
    return Attention.run(q, k, v, lengths, name)
