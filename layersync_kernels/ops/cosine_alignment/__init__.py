"""Weighted mean of row-wise cosine similarities: the alignment term of LayerSync, REPA, iREPA, SRA and CREPA."""

from .op import cosine_alignment
from .reference import cosine_alignment_reference, reduce_rows

__all__ = ["cosine_alignment", "cosine_alignment_reference", "reduce_rows"]
