"""Every op as users call it: stateless, documented, any leading dimensions."""

from .attention import attention, self_attention
from .cosine import cosine_loss, layersync_loss
from .dispersive import dispersive_loss
from .gelu import gelu_mlp, linear_gelu
from .gram import gram_alignment_loss
from .projected import projected_alignment_loss
from .qk import qk_norm_rope
from .seam import (
    Seam,
    Tap,
    aligned_residual_norm,
    gated_residual,
    gated_residual_norm,
    modulated_layer_norm,
    modulated_rms_norm,
)
from .spatial_norm import spatial_norm
from .swiglu import swiglu, swiglu_mlp

__all__ = [
    "Seam",
    "Tap",
    "aligned_residual_norm",
    "attention",
    "cosine_loss",
    "dispersive_loss",
    "gated_residual",
    "gated_residual_norm",
    "gelu_mlp",
    "gram_alignment_loss",
    "layersync_loss",
    "linear_gelu",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "projected_alignment_loss",
    "qk_norm_rope",
    "self_attention",
    "spatial_norm",
    "swiglu",
    "swiglu_mlp",
]
