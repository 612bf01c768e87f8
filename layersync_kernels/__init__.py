"""Fused representation-alignment losses for diffusion transformers: LayerSync on the CPU, Triton and CUDA."""

from .functional import layersync_loss
from .losses import LayerSyncLoss, default_pair

__version__ = "0.1.0"

__all__ = ["LayerSyncLoss", "__version__", "default_pair", "layersync_loss"]
