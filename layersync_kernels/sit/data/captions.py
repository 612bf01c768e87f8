"""Captions of samples, encoded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ...errors import DataError
from ..config.data import DataConfig
from ..text.registry import load_text_encoder
from .base import SampleSet
from .memory import MemorySet, check_fits

EXAMPLES = 64
"""Captions that a run keeps to draw others with."""


def with_captions(data: MemorySet, captions: Sequence[str], config: DataConfig) -> MemorySet:
    """The set with a caption for each sample, encoded where `config.text_encoder` asks for that.

    Args:
        data: N samples.
        captions: N sentences, not read without an encoder; equal ones are encoded once.
        config: of the data.

    Raises:
        DataError: embeddings beyond the memory limit, or an empty caption.
    """
    if config.text_encoder is None:
        return data
    unique = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    text, lengths = load_text_encoder(config.text_encoder).encode(list(unique))
    what = f"embeddings of {len(captions)} captions, {text.shape[1]} x {text.shape[2]} each"
    check_fits(what, 4 * len(captions) * text.shape[1] * text.shape[2], config, instead="")
    index = torch.tensor([unique[caption] for caption in captions])
    return dataclasses.replace(
        data,
        text=text[index],
        text_lengths=lengths[index],
        captions=tuple(unique)[:EXAMPLES],
        text_encoder=config.text_encoder,
    )


def captioned(data: SampleSet, captions: Sequence[object], names: Sequence[str], config: DataConfig) -> SampleSet:
    """The set with the captions of what its files hold, where `config.text_encoder` asks for that.

    Args:
        data: of `from_source`, with all samples but those that are broken.
        captions: of all samples, broken ones included; None where there is none.
        names: of the samples, as `data.broken` has them.
        config: of the data.

    Raises:
        DataError: a caption is missing, the data is streamed, or embeddings are beyond the memory limit.
    """
    if config.text_encoder is None:
        return data
    if not isinstance(data, MemorySet):
        raise DataError(f"--text-encoder: {config.data} is streamed; raise --memory-limit-gb")
    words = []
    for name, caption in zip(names, captions, strict=True):
        if name in data.broken:
            continue
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"{name} has no caption, which --text-encoder {config.text_encoder} needs for each sample")
        words.append(caption)
    return with_captions(data, words, config)
