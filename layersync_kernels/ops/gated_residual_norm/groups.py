"""How the kernels see a modulation: (G, D), each row serving M/G tokens in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def as_groups(modulation: Tensor, leading: Sequence[int]) -> Tensor:
    """View a modulation that broadcasts over (*leading, D) as (G, D), or expand it to one row per token.

    Args:
        modulation: (*dims, D), one dimension for each of `leading`, equal to it or 1.
        leading: the dimensions of the tokens.
    """
    *dims, width = modulation.shape
    shared = len(dims)  # dimensions from here on share a row
    while shared > 0 and dims[shared - 1] == 1:
        shared -= 1
    if tuple(dims[:shared]) == tuple(leading[:shared]):
        return modulation.reshape(math.prod(dims), width)
    return modulation.expand(*leading, width).reshape(math.prod(leading), width)


def in_equal_groups(modulations: Sequence[Tensor]) -> list[Tensor]:
    """Repeat the rows of (G, D) modulations up to the finest division among them."""
    groups = max(m.shape[0] for m in modulations)
    return [
        m if m.shape[0] == groups else m.unsqueeze(1).expand(-1, groups // m.shape[0], -1).flatten(0, 1)
        for m in modulations
    ]
