"""Published ``.pt`` files: {"model", "ema", "opt", "args"}, or a bare state dict.

They are read with ``weights_only=True``, where `argparse.Namespace` is the one class that is let through.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, first_line


def read_published(path: Path, *, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a published ``.pt`` by their plain names, and the arguments that the model was trained with.

    Args:
        path: the file.
        ema: take the averaged weights where both are there; where one kind is there, it is taken.

    Raises:
        CheckpointError: truncated, no PyTorch checkpoint, or without weights; names the file.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint can fail anywhere in the unpickler
        raise CheckpointError(
            f"cannot read {path}: it is truncated, no PyTorch checkpoint, or holds objects other than tensors, "
            f"which are never unpickled ({first_line(error)})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors")
    args = content.get("args")
    for key in ("ema", "model") if ema else ("model", "ema"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {_plain_name(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) != len(content):
        odd = [str(name) for name, value in content.items() if not isinstance(value, Tensor)][:5]
        raise CheckpointError(
            f"{path} is no SiT checkpoint: expected 'ema' or 'model' with tensors by name, or only tensors; found {odd}"
        )
    return tensors, dict(vars(args)) if isinstance(args, argparse.Namespace) else {}


def _plain_name(name: str) -> str:
    """A parameter's name without the prefixes of DistributedDataParallel and torch.compile."""
    return str(name).removeprefix("module.").removeprefix("_orig_mod.")
