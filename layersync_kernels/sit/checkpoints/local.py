"""Checkpoints: safetensors and JSON in a folder per step, written so that a crash or a full disk loses nothing.

    RUN/checkpoints/step_00001000/model.safetensors      weights
                                  ema.safetensors        averaged weights
                                  optimizer.safetensors  PARAMETER.exp_avg, PARAMETER.exp_avg_sq, PARAMETER.step
                                  rng.safetensors        generator states
                                  projector.safetensors  REPA's projector, where a run has one
                                  state.json             step, samples seen, training seconds, shape of the data;
                                                         "checksums": SHA-256 of each file above, by name;
                                                         "digest": SHA-256 of all else in this file

Nothing here is pickled, and nothing is read unchecked: a bit that flipped on the disk is an error that names the file.
SHA-256 hashes 1.1 GB/s on one core of a busy machine (OpenSSL, with the SHA instructions), which is about what a disk
reads: no reason for a dependency with a faster hash.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CheckpointError
from ..config.run import CONFIG
from ..files import TEMPORARY, flush

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
STATE = "state.json"
_CHECKSUMS, _DIGEST = "checksums", "digest"
_STEP_NAME = re.compile(r"step_(\d{8,})")


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, or is not what was written."""


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
    left as it is if it is whole; a damaged one makes room, see `newest_checkpoint`.

    Args:
        run_dir: folder of the run.
        step: optimiser steps done.
        tensors: file stem to named tensors, for instance {"model": model.state_dict()}.
        state: JSON values by names other than "checksums" and "digest".
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the older checkpoints are intact.
    """
    folder = run_dir / FOLDER
    target = folder / f"step_{step:08d}"
    temporary = folder / f"{TEMPORARY}{target.name}-{os.getpid()}"
    if target.is_dir():
        try:
            check_checkpoint(target)
            return target
        except DamagedCheckpoint as error:
            _set_aside(target, error)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        checksums = {}
        for stem, named in tensors.items():
            path = temporary / f"{stem}.safetensors"
            save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, path)
            flush(path)
            checksums[path.name] = _checksum(path)
        path = temporary / STATE
        content = {**state, _CHECKSUMS: checksums}
        path.write_text(json.dumps({**content, _DIGEST: _digest(content)}, indent=2) + "\n", encoding="utf-8")
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


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is whole, to go on from; None for a run that has none at all.

    Damaged ones that are newer are renamed to ``damaged-step_...``, with a warning. There they neither count as
    checkpoints to keep nor are in the way of the same step, and somebody can still look at them; nothing ever deletes
    them.

    Raises:
        DamagedCheckpoint: there are checkpoints, and all are damaged. It names what is wrong with each; they stay.
    """
    damaged: dict[Path, DamagedCheckpoint] = {}
    for checkpoint in reversed(list_checkpoints(run_dir)):
        try:
            check_checkpoint(checkpoint)
        except DamagedCheckpoint as error:
            damaged[checkpoint] = error
            continue
        for folder, reason in damaged.items():
            _set_aside(folder, reason)
        return checkpoint
    if not damaged:
        return None
    raise DamagedCheckpoint(
        f"every checkpoint of {run_dir} is damaged: {'; '.join(map(str, damaged.values()))}; "
        f"bring one back from a copy, or remove {run_dir / FOLDER} to begin anew"
    )


def _set_aside(checkpoint: Path, error: DamagedCheckpoint) -> None:
    """Renames a damaged checkpoint, and says so."""
    name = f"damaged-{checkpoint.name}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    free = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    try:
        checkpoint.rename(free)
    except OSError as reason:
        raise CheckpointError(f"{error}; it cannot be renamed: {reason}") from error
    logger.warning("%s; it is set aside as %s", error, free)


def check_checkpoint(checkpoint: Path) -> None:
    """Reads every file of a checkpoint folder and compares it with its checksum.

    Raises:
        DamagedCheckpoint: a file is missing or damaged; names it.
    """
    _, checksums = _read_state(checkpoint)
    for path in sorted(checkpoint.glob("*.safetensors")) if checksums is None else map(checkpoint.joinpath, checksums):
        _check_tensors(path, checksums)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; a file of a checkpoint is compared with its checksum first.

    Raises:
        DamagedCheckpoint: missing, truncated, not safetensors, or not what was written; names the file.
    """
    with _advising(path.parent):
        checksums = _read_state(path.parent)[1] if (path.parent / STATE).is_file() else None
        _check_tensors(path, checksums)
    return load_file(path)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint folder, as `save_checkpoint` was given it.

    Files beside it that are no part of the checkpoint are named in a warning.

    Raises:
        DamagedCheckpoint: the state is missing or damaged, or a file that it has a checksum of is missing; names it.
    """
    with _advising(checkpoint):
        return _read_state(checkpoint)[0]


def _read_state(checkpoint: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    """The state, and the checksums by file name: None in a checkpoint from before there were any."""
    path = checkpoint / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError(f"expected an object, found {type(state).__name__}")
        digest = state.pop(_DIGEST, None)
        if digest is None and _CHECKSUMS not in state:
            _log_once(logging.INFO, f"{checkpoint} is from before checkpoints had checksums, and is read unchecked")
            return state, None
        if digest != _digest(state):  # which a missing digest cannot equal
            raise ValueError("it does not fit its own digest")
        checksums: dict[str, str] = state.pop(_CHECKSUMS)
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"cannot read {path}: {error}") from error
    found = {file.name for file in checkpoint.iterdir()} - {STATE}
    if missing := sorted(checksums.keys() - found):
        raise DamagedCheckpoint(f"{checkpoint} has lost {', '.join(missing)}")
    if extra := sorted(found - checksums.keys()):
        _log_once(logging.WARNING, f"{checkpoint} has files that were not saved with it: {', '.join(extra)}")
    return state, checksums


def _check_tensors(path: Path, checksums: Mapping[str, str] | None) -> None:
    """Raises DamagedCheckpoint where a file is not what the checksums say, or without them no complete safetensors."""
    try:
        if checksums is not None:
            if path.name not in checksums:
                raise ValueError("it was not saved with this checkpoint")
            if _checksum(path) != checksums[path.name]:
                raise ValueError(f"it is damaged: its SHA-256 is not the one in {STATE}")
        with safe_open(path, "pt"):  # the header, and that the file is as long as it says
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedCheckpoint(f"cannot read {path}: {error}") from error


def _checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    checksum = hashlib.sha256()
    with path.open("rb") as file:  # hashlib.file_digest is new in Python 3.11
        while chunk := file.read(1 << 20):
            checksum.update(chunk)
    return checksum.hexdigest()


def _digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, the same before they are written and after they are read."""
    canonical = json.dumps(json.loads(json.dumps(state)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


@functools.cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)


@contextlib.contextmanager
def _advising(checkpoint: Path) -> Iterator[None]:
    """Adds to an error about a damaged checkpoint what to do, where the run has an older one."""
    try:
        yield
    except DamagedCheckpoint as error:
        checkpoints = list_checkpoints(checkpoint.parent.parent)
        if checkpoint not in checkpoints or not (older := checkpoints[: checkpoints.index(checkpoint)]):
            raise
        raise DamagedCheckpoint(
            f"{error}; to go on from {older[-1]}: layersync train --resume, or name that folder to other commands"
        ) from error


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
