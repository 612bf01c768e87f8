"""What passes between blocks: tokens, and the update that is still pending."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..functional.seam import Tap


class Stream(NamedTuple):
    """A residual stream whose last update is still to be added, in the pass that also norms it.

    Attributes:
        residual: (B, N, D).
        branch: (B, N, D), what the last half-block returned, or None.
        gate: (B, D), its gate, or None.
    """

    residual: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None


class BlockOutput(NamedTuple):
    """What a block does to a stream.

    Attributes:
        stream: with this block's MLP branch still to be added.
        hidden: (B, N, D), the stream at the block's entrance, which is the output of the block before.
        cosine: (B, N) fp32, of the student with `hidden`, or None.
        tap: of `hidden`, or None.
    """

    stream: Stream
    hidden: Tensor
    cosine: Tensor | None
    tap: Tap | None
