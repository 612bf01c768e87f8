"""torch's own attention on views of the packed tensor, differentiated by autograd: the yardstick of the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def self_attention_reference(
    qkv: Tensor, num_heads: int, lengths: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """softmax(q·kᵀ / √E)·v over all tokens: qkv (B, N, 3·H·E), its last dimension laid out [3, H, E] → (B, N, H·E).

    With lengths (B,), over those tokens alone; rows of the others are 0. A bias (3·H·E,) is part of qkv already, and
    gets its gradient, summed over tokens.
    """
    if bias is not None:
        qkv = qkv + (bias - bias.detach()).to(qkv.dtype)
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return masked_attention(q, k, v, lengths, lengths).transpose(1, 2).flatten(2)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, queries: Tensor | None, keys: Tensor | None) -> Tensor:
    """Torch's scaled_dot_product_attention between what lies within lengths; rows of all other queries are 0.

    Args:
        q: (B, H, N, E).
        k: (B, H, M, E), as v.
        v: what is summed.
        queries: int64 (B,), how many of the N are there; None: all.
        keys: the same of the M.

    Returns:
        (B, H, N, E).
    """
    mask = None
    if keys is not None:
        # A sample of nothing attends to everything, as softmax of nothing would be NaN in its gradient, too.
        mask = length_mask(keys, k.shape[2]) | (keys == 0)[:, None]
        mask = mask[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, mask)
    if queries is not None:
        out = out.masked_fill(~length_mask(queries, q.shape[2])[:, None, :, None], 0)
    if keys is not None and keys is not queries:
        out = out.masked_fill((keys == 0)[:, None, None, None], 0)
    return out


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """What lies within lengths (B,) of `size` positions: bool (B, size)."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]
