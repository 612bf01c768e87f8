"""Weights of a model, wherever they are: found, read, and put into it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ..config.optim import OptimConfig
from ..distributed.shards import load_whole, own_part
from .diffusers_keys import find_diffusers, is_diffusers, read_diffusers
from .local import list_checkpoints, read_tensors, stems, tensors_path
from .published import read_published

logger = logging.getLogger(__name__)

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
"""What weights may come in."""


@dataclass
class Weights:
    """Weights found in a file, and what the file says about the model they belong to."""

    tensors: dict[str, Tensor]
    path: Path
    """The file."""
    args: dict[str, Any] = field(default_factory=dict)
    """What a published file says the model was trained with; else empty."""


def find_weights(path: Path) -> Path:
    """The newest checkpoint of a run, or the checkpoint folder or weight file that `path` is; of a folder of diffusers,
    its file.

    Raises:
        CheckpointError: nothing there, or a run without checkpoints.
    """
    if path.is_file() or (path / "state.json").is_file():
        return path
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; expected a run, a checkpoint folder, a .pt or a .safetensors file"
        )
    if (file := find_diffusers(path)) is not None:
        return file
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise CheckpointError(f"{path} holds no checkpoint")
    return checkpoints[-1]


def load_weights(path: Path, *, which: str = "ema") -> Weights:
    """Reads model weights from a run, a checkpoint folder, a safetensors file, a published ``.pt`` or a folder that
    holds a `DiTTransformer2DModel` of diffusers.

    Args:
        path: where to look.
        which: of a run, the stem of the file: "ema", "model", or "ema-DECAY" of further averages. Of a published file,
            "model" or its average, where both are there.

    Raises:
        CheckpointError: not found, truncated, or of a foreign kind; names the file.
    """
    found = find_weights(path)
    if found.is_dir():
        there = sorted((s for s in stems(found) if s == "model" or s.startswith("ema")), key=lambda s: s != "model")
        if which not in there and any(stem != "model" for stem in there):
            raise CheckpointError(f"{found} has no weights {which!r}; it has: {', '.join(there)}")
        file = tensors_path(found, which)
        return Weights(read_tensors(file), file)
    if is_diffusers(found):
        return Weights(read_diffusers(found), found)
    if found.suffix == ".safetensors":
        return Weights(read_tensors(found), found)
    tensors, args = read_published(found, ema=which != "model")
    return Weights(tensors, found, args)


def warn_of_first_weights(config: OptimConfig, steps: int, which: str = "ema") -> None:
    """Says how much of an average is still the weights that training began with, where that is more than a tenth."""
    if which in config.averages and (share := config.start_in_average(steps, which)) > 0.1:
        logger.warning(
            "after %d steps %.0f %% of the averaged weights are still those that training began with (--ema-decay %g): "
            "draw with --weights model, or train longer, with --ema-warmup or a lower --ema-decay",
            steps,
            100 * share,
            config.averages[which],
        )


def fill_model(model: nn.Module, weights: Weights, *, exact: bool = False) -> None:
    """Loads `weights` into `model`.

    Args:
        model: of any floating type.
        weights: all of them, and no others; whole, or divided as the model is.
        exact: whether the types have to be those of `model`; else one floating type may stand for another.

    Raises:
        CheckpointError: names, shapes or types differ, or a number is not finite; names the file and the first
            differences.
    """
    check_fit(model.state_dict(), weights, exact=exact)
    load_whole(model, weights.tensors)


def check_fit(expected: Mapping[str, Tensor], weights: Weights, *, exact: bool = False) -> None:
    """Raises as `fill_model` does; `expected` is the state of a model, which may be on the meta device."""
    differences = [f"missing {name}" for name in expected if name not in weights.tensors]
    for name, tensor in weights.tensors.items():
        if name not in expected:
            differences.append(f"unexpected {name}")
        elif tensor.shape != expected[name].shape:
            differences.append(f"{name} is {tuple(tensor.shape)}, the model has {tuple(expected[name].shape)}")
        elif tensor.dtype != expected[name].dtype and (exact or not {tensor.dtype, expected[name].dtype} <= FLOATS):
            differences.append(f"{name} is {tensor.dtype}, the model has {expected[name].dtype}")
        elif not is_finite(tensor):
            differences.append(f"{name} is not finite")
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise CheckpointError(f"{weights.path} does not fit this model: {'; '.join(differences[:4])}{more}")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are, of those that this process holds; in one pass that allocates nothing."""
    tensor = own_part(tensor)
    if tensor.dtype not in FLOATS or not tensor.numel():
        return True
    low, high = tensor.aminmax()  # NaN if there is one
    return bool(low.isfinite() & high.isfinite())
