"""Weights, of ours and of published `.pt` files."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError


@dataclass
class Weights:
    """Weights found in a file, and what the file says about the model they belong to."""

    tensors: dict[str, Tensor]
    path: Path
    args: dict[str, Any] = field(default_factory=dict)


def load_published(path: Path, *, ema: bool) -> Weights:
    """Reads a published `.pt`; raises CheckpointError where it is none."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint can fail anywhere in the unpickler
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot read {path}: it is truncated, no PyTorch checkpoint, or holds objects other than tensors, "
            f"which are never unpickled ({reason})"
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
    return Weights(tensors, path, dict(vars(args)) if isinstance(args, argparse.Namespace) else {})


def _plain_name(name: str) -> str:
    """A parameter's name without the prefixes of DistributedDataParallel and torch.compile."""
    return str(name).removeprefix("module.").removeprefix("_orig_mod.")


def fill_model(model: nn.Module, weights: Weights) -> None:
    """Loads `weights` into `model`.

    Raises:
        CheckpointError: names or shapes differ; names the file and the first differences.
    """
    expected = model.state_dict()
    differences = [f"missing {name}" for name in expected if name not in weights.tensors]
    for name, tensor in weights.tensors.items():
        if name not in expected:
            differences.append(f"unexpected {name}")
        elif tensor.shape != expected[name].shape:
            differences.append(f"{name} is {tuple(tensor.shape)}, the model has {tuple(expected[name].shape)}")
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise CheckpointError(f"{weights.path} does not fit this model: {'; '.join(differences[:4])}{more}")
    model.load_state_dict(weights.tensors)
