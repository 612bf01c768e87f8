"""The reference SiT: the model, and its transport between noise and data."""

from .model import SiT, SiTBlock, sit_models
from .transport import Sampler, Transport, create_transport

__all__ = ["Sampler", "SiT", "SiTBlock", "Transport", "create_transport", "sit_models"]
