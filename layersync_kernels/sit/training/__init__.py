"""The trainer: knows no metric."""

from .loop import Outcome, Trainer

__all__ = ["Outcome", "Trainer"]
