"""Self-attention over packed queries, keys and values, with one packed gradient."""

from .op import SelfAttention, UnpackHeads
from .reference import self_attention_reference

__all__ = ["SelfAttention", "UnpackHeads", "self_attention_reference"]
