"""Packages that need not be installed."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import ConfigError


def optional_module(name: str, purpose: str, install: str) -> Any:
    """A module of a package that need not be installed.

    Args:
        name: of the module.
        purpose: what needs it, for the message.
        install: what `pip install` has to be given.

    Raises:
        ConfigError: it cannot be imported; names what brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{purpose} needs a package: {error}; pip install '{install}'") from error
