"""nn.Module pieces of a denoiser's block."""

from .attention import Attention
from .block import AdaLNZeroBlock
from .mlp import GeluMlp, SwiGluMlp
from .norm import ModulatedNorm
from .rope import rope_2d
from .stream import BlockOutput, Stream

__all__ = ["AdaLNZeroBlock", "Attention", "BlockOutput", "GeluMlp", "ModulatedNorm", "Stream", "SwiGluMlp", "rope_2d"]
