"""Video."""

from __future__ import annotations

from ..config.run import TrainConfig

PRESETS: dict[str, TrainConfig] = {}
