"""The reference SiT: model, transport, sampler, trainer."""

from ..modules.published import SiTBlock
from .diffusion.sampler import Sampler
from .diffusion.transport import Transport, create_transport
from .models.registry import sit_models
from .models.sit import SiT

__all__ = ["Sampler", "SiT", "SiTBlock", "Transport", "create_transport", "sit_models"]
