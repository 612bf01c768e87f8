"""Fused representation-alignment losses for diffusion transformers: LayerSync on the CPU, Triton and CUDA."""

from .functional.cosine import layersync_loss
from .integrate import LayerSync, RepresentationAlignment, apply_layersync_kernels
from .losses.layersync import LayerSyncLoss
from .losses.pairs import default_pair
from .losses.representation import RepresentationAlignmentLoss

__version__ = "0.1.0"

__all__ = [
    "LayerSync",
    "LayerSyncLoss",
    "RepresentationAlignment",
    "RepresentationAlignmentLoss",
    "__version__",
    "apply_layersync_kernels",
    "default_pair",
    "layersync_loss",
]
