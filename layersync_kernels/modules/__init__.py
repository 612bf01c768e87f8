"""nn.Module pieces of a denoiser's block."""

from .attention import Attention, CrossAttention, rotary_positions
from .block import AdaLNZeroBlock, BlockOutput
from .mlp import GeluMlp, SwiGluMlp
from .norm import ModulatedNorm, Stream

__all__ = [
    "AdaLNZeroBlock",
    "Attention",
    "BlockOutput",
    "CrossAttention",
    "GeluMlp",
    "ModulatedNorm",
    "Stream",
    "SwiGluMlp",
    "rotary_positions",
]
