"""Self-attention over packed queries, keys and values, with one packed gradient."""

from .op import SelfAttention, UnpackHeads
from .reference import length_mask, masked_attention, self_attention_reference

__all__ = ["SelfAttention", "UnpackHeads", "length_mask", "masked_attention", "self_attention_reference"]
