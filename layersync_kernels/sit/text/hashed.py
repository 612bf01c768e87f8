"""Embeddings of words without a network: hashed n-grams, as in fastText, with signs in place of learnt vectors."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .base import TextEncoder

WORDS = re.compile(r"\w+|[^\w\s]")
MAX_WORDS = 64
"""Later words of a caption are left out."""


class HashedEncoder(TextEncoder):
    """A vector for each word: half of it that of the word, half that of its n-grams of 3 to 5 letters, so that words of
    one stem are alike. Upper case does not count. Each value has a mean square of 1.
    """

    width = 128

    def _encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [torch.from_numpy(np.stack([_embed(w) for w in _words(caption)])) for caption in captions]
        return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def _words(caption: str) -> list[str]:
    return WORDS.findall(caption.lower())[:MAX_WORDS]


@functools.lru_cache(maxsize=2**16)
def _embed(word: str) -> np.ndarray:
    framed = f"<{word}>"
    grams = [framed[i : i + n] for n in (3, 4, 5) for i in range(len(framed) - n + 1)] or [framed]
    vector = _signs(f"word {word}") + np.sum([_signs(gram) for gram in grams], 0) / np.sqrt(len(grams))
    return (vector / np.sqrt(np.square(vector).mean() + 1e-12)).astype(np.float32)


def _signs(text: str) -> np.ndarray:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=HashedEncoder.width // 8).digest()
    return np.unpackbits(np.frombuffer(digest, np.uint8)) * 2.0 - 1.0
