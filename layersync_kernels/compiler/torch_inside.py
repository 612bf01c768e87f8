"""Access to what is private in torch, with a clear error where a version has moved it."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any
from unittest import mock

import torch

from ..errors import UserError


def moved(what: object) -> UserError:
    """What to raise where a version of torch lacks something that this file takes from its inside."""
    return UserError(
        "counts of GPU graphs (layersync bench traffic --device h100) were written for torch 2.10-2.14; "
        f"torch {torch.__version__} moved {what}"
    )


@functools.cache
def inside(path: str) -> Any:
    """Something private of torch, "module:name.name" or a module."""
    module, _, names = path.partition(":")
    try:
        return functools.reduce(getattr, filter(None, names.split(".")), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise moved(path.replace(":", ".")) from error


def patch_in(stack: contextlib.ExitStack, target: Any, name: str, value: Any) -> None:
    """Replace an attribute until the end of the stack; an error where there is none."""
    if not hasattr(target, name):
        raise moved(f"{getattr(target, '__name__', target)}.{name}")
    stack.enter_context(mock.patch.object(target, name, value))
