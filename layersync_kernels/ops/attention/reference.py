"""torch's own attention on views of the packed tensor, differentiated by autograd: the yardstick of the tests."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def self_attention_reference(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q·kᵀ / √E)·v over all tokens: qkv (B, N, 3·H·E), its last dimension laid out [3, H, E] → (B, N, H·E)."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
