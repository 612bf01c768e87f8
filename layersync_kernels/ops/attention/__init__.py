"""Self-attention over packed queries, keys and values, with one packed gradient."""

from .op import self_attention
from .reference import self_attention_reference

__all__ = ["self_attention", "self_attention_reference"]
