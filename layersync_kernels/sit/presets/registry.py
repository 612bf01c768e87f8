"""Presets by name."""

from __future__ import annotations

from ..config.run import TrainConfig
from .audio import PRESETS as AUDIO
from .images import PRESETS as IMAGES
from .motion import PRESETS as MOTION
from .small import PRESETS as SMALL
from .video import PRESETS as VIDEO

PRESETS: dict[str, TrainConfig] = {**SMALL, **IMAGES, **AUDIO, **MOTION, **VIDEO}
"""Settings by name. "small" and that of a modality alone are for two cores and minutes, the others are for cards."""
