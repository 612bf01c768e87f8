"""Self-attention over packed queries, keys and values, or over three tensors, with one packed gradient."""

from .op import Attention, SelfAttention, unpack_heads
from .reference import length_mask, masked_attention, self_attention_reference

__all__ = [
    "Attention",
    "SelfAttention",
    "length_mask",
    "masked_attention",
    "self_attention_reference",
    "unpack_heads",
]
