"""Normalisation of a constant teacher over the tokens of each sample."""

from .op import spatial_norm
from .reference import spatial_norm_reference

__all__ = ["spatial_norm", "spatial_norm_reference"]
