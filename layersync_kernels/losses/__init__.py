"""Alignment losses as modules over captured hidden states."""

from .layersync import LayerSyncLoss
from .pairs import default_pair
from .representation import RepresentationAlignmentLoss

__all__ = ["LayerSyncLoss", "RepresentationAlignmentLoss", "default_pair"]
