"""Checks of ranges."""

from __future__ import annotations

from ...errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message where the condition does not hold."""
    if not condition:
        raise ConfigError(message)
