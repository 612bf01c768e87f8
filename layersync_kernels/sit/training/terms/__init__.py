"""The terms of the loss beside the flow's own, a file each."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .base import LossTerm, Setting, TermBuilder
from .dispersive import DispersiveTerm
from .layersync import LayerSyncTerm
from .repa import RepaTerm
from .sra import SraTerm

TERMS: tuple[TermBuilder, ...] = (LayerSyncTerm.build, RepaTerm.build, SraTerm.build, DispersiveTerm.build)
"""What a trainer builds its terms with, in the order in which they are added up."""


def build_terms(builders: Iterable[TermBuilder], setting: Setting) -> list[LossTerm]:
    """The terms that the config asks for. Whatever they draw, everything else starts from the same random numbers."""
    with torch.random.fork_rng(devices=[]):
        built = [build(setting) for build in builders]
    return [term for term in built if term is not None]
