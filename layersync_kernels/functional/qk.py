"""Norm and rotary positions of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import compiled, dispatch
from ..ops.attention import unpack_heads
from ..ops.autograd import transform
from ..ops.qk_norm_rope import MAX_WIDTH, qk_norm_rope_reference
from ..ops.qk_norm_rope import qk_norm_rope as _qk_norm_rope
from .checks import check_dense, check_positive, check_tokens, check_vector

_OP = "qk_norm_rope"
_NORMS = ("rms", "layer")


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    *,
    norm: str = "rms",
    interleaved: bool = True,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Norms queries and keys over the channels of each head and turns them by rotary positions, in one pass over qkv.

    Backward writes the packed gradient of qkv, that of the values with it, in one pass more. Saves qkv, and nothing but
    cos and sin where there is no norm.

    Args:
        qkv: (B, N, 3·H·E), laid out [3, H, E] in the last dimension as a joint projection leaves it; any strides;
            float32, bfloat16 or float16, and float64 through the reference. The kernels take E up to 256; above it,
            "auto" is the reference.
        q_weight: (E,) of the norm of the queries, of any floating dtype. None, with k_weight: no norm.
        k_weight: the same of the keys.
        cos: float32 (N, E), as `modules.rotary_positions` makes them for one, two or three dimensions; float64 with
            float64. A constant. None, with sin: no rotation.
        sin: as cos.
        num_heads: H.
        eps: added to the mean square, or to the variance.
        norm: "rms", or "layer", which subtracts the mean first.
        interleaved: True: neighbouring channels are a pair that turns, (a, b) → (a·cos − b·sin, b·cos + a·sin), each
            with its own channel of cos and sin. False: the channels half of E apart are ("rotate half"), for which cos
            and sin are laid out in the same way.
        bias: (3·H·E,), what the projection has added to qkv already. It changes no value: its gradient is that of qkv
            summed over tokens, which comes with the same pass. Give it detached to the projection, or it counts twice.
        backend: "auto", "reference", "cpp", "triton", "cuda" or "compile" (the reference under torch.compile).

    Returns:
        q, k and v, each (B, H, N, E) of qkv's dtype. q and k lie in memory as (B, N, H, E), v is a view of qkv.

    Raises:
        ValueError: qkv that is not three-dimensional or does not divide into heads; one of two weights, or of cos and
            sin; weights, cos, sin or bias of another shape or device; cos or sin that require grad; heads of odd width
            with a rotation, or wider than the kernels take; an unknown norm; an eps that is not positive.
        TypeError: a tensor that is not dense or has another dtype than those above.
        RuntimeError: a backend that was asked for and cannot run; double backward.

    Source: Dehghani et al. 2023, arXiv:2302.05442 (norms of queries and keys); Zhang and Sennrich 2019,
    arXiv:1910.07467 (RMSNorm); Su et al. 2021, arXiv:2104.09864 (rotary positions).
    """
    check_tokens(_OP, "qkv", qkv)
    if norm not in _NORMS:
        raise ValueError(f"{_OP}: unknown norm={norm!r}; expected {' or '.join(map(repr, _NORMS))}")
    check_positive(_OP, "eps", eps)
    if qkv.dim() != 3:
        raise ValueError(f"{_OP}: qkv must be (B, N, 3·H·E), got {tuple(qkv.shape)}")
    if num_heads < 1 or qkv.shape[-1] % (3 * num_heads) != 0:
        raise ValueError(
            f"{_OP}: the last dimension of qkv must be 3 · {num_heads} heads · head width, got {qkv.shape[-1]} in "
            f"{tuple(qkv.shape)}"
        )
    width = qkv.shape[-1] // (3 * num_heads)
    _check_pair("q_weight", q_weight, "k_weight", k_weight, "norm")
    _check_pair("cos", cos, "sin", sin, "rotation")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_vector(_OP, name, weight, "qkv", qkv, (width,), "one value for each channel of a head")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None:
            continue
        _check_table(name, table, qkv, width)
    if bias is not None:
        check_vector(_OP, "bias", bias, "qkv", qkv, qkv.shape[-1:], "the bias of the projection that made qkv")
    if q_weight is None and cos is None and transform() is None:
        return unpack_heads(qkv, bias, num_heads)
    if width > MAX_WIDTH and backend == "auto":
        backend = "reference"
    name = dispatch.resolve(_OP, backend, qkv.device.type, qkv.dtype, tokens=qkv, parts=3)
    arguments = (qkv, q_weight, k_weight, cos, sin, bias, num_heads, float(eps), norm == "layer", interleaved)
    if name in dispatch.PLAIN or qkv.numel() == 0:
        return compiled.plain(_OP, name, qk_norm_rope_reference, qkv.shape[-1])(*arguments)
    if width > MAX_WIDTH:
        raise ValueError(
            f"{_OP}: heads of {width} channels; the kernels take at most {MAX_WIDTH}. Use more heads, or "
            "backend='reference'"
        )
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    return _qk_norm_rope(
        qkv, q_weight, k_weight, cos, sin, bias, num_heads, float(eps), norm == "layer", interleaved, name
    )


def _check_pair(name: str, tensor: Tensor | None, other_name: str, other: Tensor | None, what: str) -> None:
    if (tensor is None) != (other is None):
        missing = name if tensor is None else other_name
        raise ValueError(f"{_OP}: {missing} is missing; give both {name} and {other_name}, or neither for no {what}")


def _check_table(name: str, table: Tensor, qkv: Tensor, width: int) -> None:
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    allowed = (torch.float32, wide)
    check_dense(_OP, name, table, allowed, "float32", "; positions lose their precision in another dtype")
    if width % 2:
        raise ValueError(f"{_OP}: heads of {width} channels; a rotation takes pairs of them: an even number")
    if table.shape != (qkv.shape[1], width):
        raise ValueError(
            f"{_OP}: {name} {tuple(table.shape)} must have the shape ({qkv.shape[1]}, {width}): one row for each "
            "token, one value for each channel of a head"
        )
    if table.device != qkv.device:
        raise ValueError(f"{_OP}: {name} is on {table.device} and qkv on {qkv.device}; move one of them")
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{_OP}: {name} is not differentiated; detach() it")
