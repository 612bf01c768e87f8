"""What is asked of an encoder of captions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ...errors import DataError


class TextEncoder(ABC):
    """Turns captions into embeddings; the same caption always into the same.

    Attributes:
        width: E of what it gives.
    """

    width: int

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A sequence of embeddings for each caption.

        Args:
            captions: N sentences, N at least 1.

        Returns:
            float32 (N, L, E), zeros beyond lengths, L being that of the longest; int64 (N,), at least 1.

        Raises:
            DataError: no captions, or an empty one.
        """
        if not captions:
            raise DataError("there are no captions; expected at least one")
        for number, caption in enumerate(captions):
            if not caption.strip():
                raise DataError(f"caption {number} is empty; expected a sentence")
        return self._encode(captions)

    @abstractmethod
    def _encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]: ...
