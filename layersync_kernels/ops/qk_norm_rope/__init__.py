"""Norm and rotary positions of queries and keys in one pass over the packed projection."""

from .op import MAX_WIDTH, qk_norm_rope
from .reference import qk_norm_rope_reference

__all__ = ["MAX_WIDTH", "qk_norm_rope", "qk_norm_rope_reference"]
