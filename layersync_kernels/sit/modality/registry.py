"""Modalities by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config.io import build
from .audio import Mel, Waveform
from .base import Modality
from .images import Images
from .latents import Latents
from .motion import Motion

MODALITIES: dict[str, type[Modality]] = {kind.kind: kind for kind in (Images, Latents, Mel, Motion, Waveform)}
"""A new one belongs here."""


def modality_facts(modality: Modality) -> dict[str, Any]:
    """JSON values, from which `build_modality` makes the same again."""
    return {"kind": modality.kind, **dataclasses.asdict(modality)}


def build_modality(facts: Mapping[str, Any]) -> Modality:
    """That of `modality_facts`; raises ValueError where the values are of none."""
    settings = dict(facts)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str) or kind not in MODALITIES:
        raise ValueError(f"modality.kind is {kind!r:.200}; expected one of {sorted(MODALITIES)}")
    return build(MODALITIES[kind], settings, "modality.")
