"""The mathematics in plain PyTorch: oracle of the tests, last fallback."""

from __future__ import annotations

import torch
from torch import Tensor


def qk_norm_rope_reference(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and rotation of queries and keys, head by head. Arithmetic in fp32, fp64 for fp64; rounded once.

    Args:
        qkv: (B, N, 3·H·E), its last dimension laid out [3, H, E].
        q_weight: (E,) of the norm, or None for no norm.
        k_weight: the same of the keys.
        cos: (N, E), or None for no rotation.
        sin: as cos.
        bias: (3·H·E,), already part of qkv: gets the gradient of qkv, summed over tokens; or None.
        heads: H.
        eps: added to the mean square, or to the variance.
        centred: LayerNorm, else RMSNorm.
        interleaved: pairs that turn are neighbours, else half a head apart.

    Returns:
        q, k and v, each (B, H, N, E).
    """
    if bias is not None:
        qkv = qkv + (bias - bias.detach()).to(qkv.dtype)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = x.to(wide)
        if weight is not None:
            if centred:
                y = y - y.mean(dim=-1, keepdim=True)
            y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps) * weight.to(wide)
        if cos is not None and sin is not None:
            y = y * cos.to(wide) + turned(y, interleaved) * sin.to(wide)
        results.append(y.to(qkv.dtype))
    return results[0], results[1], v


def turned(x: Tensor, interleaved: bool) -> Tensor:
    """(a, b) → (-b, a) for the pairs of channels of x (..., E): neighbours, or those half of E apart."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)
