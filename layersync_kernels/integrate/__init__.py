"""LayerSync in other people's models: a few lines in the training step, no edit of the model."""

from .sync import LayerSync

__all__ = ["LayerSync"]
