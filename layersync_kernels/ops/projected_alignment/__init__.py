"""A linear layer and the cosine of its rows to a teacher's: the last layer of a projector, with the alignment loss."""

from .chunks import linear_rows
from .op import projected_alignment
from .reference import projected_alignment_reference

__all__ = ["linear_rows", "projected_alignment", "projected_alignment_reference"]
