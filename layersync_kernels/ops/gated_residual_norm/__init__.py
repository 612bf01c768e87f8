"""The seam between two half-blocks: gate, residual, norm and modulation, with an alignment riding along."""

from .op import gated_residual_norm
from .reference import gated_residual_norm_reference

__all__ = ["gated_residual_norm", "gated_residual_norm_reference"]
