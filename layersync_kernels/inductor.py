"""Finds the alignment loss in what `torch.compile` compiles; see `compiler.inductor`."""

from .compiler.inductor import disable, enable

__all__ = ["disable", "enable"]
