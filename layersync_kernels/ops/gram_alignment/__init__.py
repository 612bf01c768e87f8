"""Mean difference of the cosine matrices of student and teacher: the term of VideoREPA, U-REPA, SARA and VA-VAE."""

from .op import KINDS, gram_alignment
from .reference import gram_alignment_reference

__all__ = ["KINDS", "gram_alignment", "gram_alignment_reference"]
