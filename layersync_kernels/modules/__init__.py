"""nn.Module pieces of a denoiser's block."""

from .attention import Attention, rope_2d
from .block import AdaLNZeroBlock, BlockOutput
from .mlp import GeluMlp, SwiGluMlp
from .norm import ModulatedNorm, Stream

__all__ = ["AdaLNZeroBlock", "Attention", "BlockOutput", "GeluMlp", "ModulatedNorm", "Stream", "SwiGluMlp", "rope_2d"]
