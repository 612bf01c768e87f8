"""LayerSync in other people's models: a few lines in the training step, no edit of the model."""

from .repa import RepresentationAlignment
from .replace import Replacement, apply_layersync_kernels
from .sync import LayerSync

__all__ = ["LayerSync", "Replacement", "RepresentationAlignment", "apply_layersync_kernels"]
