"""Encoders of captions by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ...errors import ConfigError
from .base import TextEncoder
from .hashed import HashedEncoder
from .pretrained import PretrainedEncoder

TRANSFORMERS = "transformers/"


class EncoderKind(NamedTuple):
    """A kind of encoder.

    Attributes:
        expected: how `--text-encoder` names it, for the message about a name that no kind takes.
        takes: whether a name is of this kind.
        load: makes it.
    """

    expected: str
    takes: Callable[[str], bool]
    load: Callable[[str], TextEncoder]


TEXT_ENCODERS: list[EncoderKind] = [
    EncoderKind("hashed", lambda name: name == "hashed", lambda name: HashedEncoder()),
    EncoderKind(
        f"{TRANSFORMERS}NAME",
        lambda name: name.startswith(TRANSFORMERS) and name != TRANSFORMERS,
        lambda name: PretrainedEncoder(name.removeprefix(TRANSFORMERS)),
    ),
]
"""A new one belongs here."""


def load_text_encoder(name: str) -> TextEncoder:
    """The encoder of that name.

    Raises:
        ConfigError: there is none, or what it needs is missing.
    """
    for kind in TEXT_ENCODERS:
        if kind.takes(name):
            return kind.load(name)
    raise ConfigError(f"--text-encoder {name!r}: expected {' or '.join(kind.expected for kind in TEXT_ENCODERS)}")
