"""A user's own data set, by the Python path of what makes it."""

from __future__ import annotations

import importlib
import os
import re
import sys

from ...errors import DataError, first_line
from ..config.data import DataConfig
from .base import SampleSet

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_python_path(name: str) -> bool:
    """Whether a name is MODULE:FUNCTION, and no file of that name is there."""
    return _PATH.fullmatch(name) is not None and not name.startswith("torchvision:") and not os.path.exists(name)


def load_user(config: DataConfig) -> SampleSet:
    """What FUNCTION of MODULE returns when it is given the settings.

    The module is looked for in the working directory too. A set is a `SampleSet`: a class with `spec`, `num_classes`,
    `class_names`, `__len__` and `take`.

    Raises:
        DataError: it cannot be imported, fails, or returns something else; names what it raised.
    """
    module, _, function = config.data.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        data = getattr(importlib.import_module(module), function)(config)
    except DataError:
        raise
    except Exception as error:  # whatever a user's code raises
        raise DataError(f"--data {config.data}: {type(error).__name__}: {first_line(error)}") from error
    finally:
        sys.path.remove(here)
    if not isinstance(data, SampleSet):
        raise DataError(f"--data {config.data} returned a {type(data).__name__}; expected a SampleSet")
    return data
