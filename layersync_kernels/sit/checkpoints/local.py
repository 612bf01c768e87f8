"""Checkpoints: safetensors and JSON in a folder per step, written so that a crash or a full disk loses nothing.

    RUN/checkpoints/step_00001000/model.safetensors      weights
                                  ema.safetensors        averaged weights
                                  optimizer.safetensors  PARAMETER.exp_avg, PARAMETER.exp_avg_sq, PARAMETER.step
                                  rng.safetensors        generator states
                                  state.json             step, samples seen, training seconds, shape of the data

Nothing here is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CheckpointError
from ..config.run import CONFIG
from ..files import TEMPORARY, flush

FOLDER = "checkpoints"
_STEP_NAME = re.compile(r"step_(\d{8,})")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _STEP_NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    run_dir: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Writes one checkpoint and then removes all but the newest `keep`.

    Everything goes into a temporary folder beside the others, is flushed to the disk and renamed: a checkpoint is there
    entirely or not at all, and no older one is touched before the new one is complete. A step that is there already is
    left as it is.

    Args:
        run_dir: folder of the run.
        step: optimiser steps done.
        tensors: file stem to named tensors, for instance {"model": model.state_dict()}.
        state: JSON values.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the older checkpoints are intact.
    """
    folder = run_dir / FOLDER
    target = folder / f"step_{step:08d}"
    temporary = folder / f"{TEMPORARY}{target.name}-{os.getpid()}"
    if target.is_dir():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        for stem, named in tensors.items():
            path = temporary / f"{stem}.safetensors"
            save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, path)
            flush(path)
        path = temporary / "state.json"
        path.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        flush(path)
        flush(temporary)
        temporary.rename(target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = list_checkpoints(run_dir)
        kept = f"the last good checkpoint is {last[-1]}" if last else "there is no earlier checkpoint"
        raise CheckpointError(f"cannot save {target}: {error}; {kept}") from error
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: missing, truncated or not safetensors; names the file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}{_older(path)}") from error


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint folder.

    Raises:
        CheckpointError: missing or damaged; names the file.
    """
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError(f"expected an object, found {type(state).__name__}")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}{_older(path)}") from error
    return state


def _older(path: Path) -> str:
    """Advice for a damaged file of a checkpoint folder that has an older neighbour."""
    checkpoints = list_checkpoints(path.parent.parent.parent)
    if path.parent in checkpoints and (older := checkpoints[: checkpoints.index(path.parent)]):
        return f"; remove {path.parent} to go on from {older[-1]}"
    return ""


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The state of an optimiser as named tensors. `names`: those of its parameters, in order."""
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}.{key}": value for i, entry in state.items() for key, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` took out; hyperparameters stay those of `optimizer`.

    Raises:
        CheckpointError: a tensor belongs to no parameter.
    """
    number = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition(".")
        if name not in number:
            raise CheckpointError(f"the optimiser state has {full_name!r}, which is no parameter of this model")
        state.setdefault(number[name], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def run_of(path: Path) -> Path | None:
    """The run that a run folder or checkpoint folder belongs to, or None for a lone file."""
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / CONFIG).is_file():
            return folder
    return None
