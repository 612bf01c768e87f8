"""Weights of a model, wherever they are: found, read, and put into it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import CheckpointError
from .local import list_checkpoints, read_tensors
from .published import read_published


@dataclass
class Weights:
    """Weights found in a file, and what the file says about the model they belong to."""

    tensors: dict[str, Tensor]
    path: Path
    """The file."""
    args: dict[str, Any] = field(default_factory=dict)
    """What a published file says the model was trained with; else empty."""


def find_weights(path: Path) -> Path:
    """The newest checkpoint of a run, or the checkpoint folder or weight file that `path` is.

    Raises:
        CheckpointError: nothing there, or a run without checkpoints.
    """
    if path.is_file() or (path / "state.json").is_file():
        return path
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; expected a run, a checkpoint folder, a .pt or a .safetensors file"
        )
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(f"{path} holds no checkpoint")
    return checkpoints[-1]


def load_weights(path: Path, *, ema: bool = True) -> Weights:
    """Reads model weights from a run, a checkpoint folder, a safetensors file or a published ``.pt``.

    Args:
        path: where to look.
        ema: take the averaged weights where both are there.

    Raises:
        CheckpointError: not found, truncated, or of a foreign kind; names the file.
    """
    found = find_weights(path)
    if found.is_dir():
        file = found / ("ema.safetensors" if ema else "model.safetensors")
        return Weights(read_tensors(file), file)
    if found.suffix == ".safetensors":
        return Weights(read_tensors(found), found)
    tensors, args = read_published(found, ema=ema)
    return Weights(tensors, found, args)


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
