"""Linear layers with tanh-GELU between or behind them, the activation and its gradient in single passes."""

from .op import gelu_mlp, linear_gelu
from .reference import gelu_mlp_reference, linear_gelu_reference

__all__ = ["gelu_mlp", "gelu_mlp_reference", "linear_gelu", "linear_gelu_reference"]
