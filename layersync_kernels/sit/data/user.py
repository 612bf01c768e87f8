"""A user's own data set, by the Python path of what makes it."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

from ...errors import DataError, first_line
from ..config.data import DataConfig
from .base import SampleSet

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_python_path(name: str) -> bool:
    """Whether a name is MODULE:FUNCTION, and no file of that name is there."""
    return _PATH.fullmatch(name) is not None and not name.startswith("torchvision:") and not os.path.exists(name)


def user_object(path: str) -> Any:
    """FUNCTION of MODULE, for MODULE:FUNCTION; the module is looked for in the working directory too.

    Raises whatever importing it raises, and AttributeError.
    """
    module, _, name = path.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        sys.path.remove(here)


def load_user(config: DataConfig) -> SampleSet:
    """What FUNCTION of MODULE returns when it is given the settings.

    A set is a `SampleSet`: a class with `spec`, `num_classes`,
    `class_names`, `__len__` and `take`.

    Raises:
        DataError: it cannot be imported, fails, or returns something else; names what it raised.
    """
    try:
        data = user_object(config.data)(config)
    except DataError:
        raise
    except Exception as error:  # whatever a user's code raises
        raise DataError(f"--data {config.data}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(data, SampleSet):
        raise DataError(f"--data {config.data} returned a {type(data).__name__}; expected a SampleSet")
    return data
