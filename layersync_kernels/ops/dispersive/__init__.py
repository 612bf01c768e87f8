"""Dispersion of a batch: the log of the mean affinity of all pairs of samples."""

from .op import dispersive_loss
from .reference import dispersive_loss_reference

__all__ = ["dispersive_loss", "dispersive_loss_reference"]
