"""Self-attention over packed queries, keys and values, with one packed gradient."""

from .op import SelfAttention, UnpackHeads, kernels_win
from .reference import self_attention_reference

__all__ = ["SelfAttention", "UnpackHeads", "kernels_win", "self_attention_reference"]
