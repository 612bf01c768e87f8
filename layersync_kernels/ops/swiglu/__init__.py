"""Gated linear units: an activation of one half of the channels times the other half, alone and inside an MLP."""

from .op import swiglu, swiglu_mlp
from .reference import swiglu_mlp_reference, swiglu_reference

__all__ = ["swiglu", "swiglu_mlp", "swiglu_mlp_reference", "swiglu_reference"]
