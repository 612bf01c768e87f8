"""Checkpoints: safetensors and JSON in a folder per step, written so that a crash or a full disk loses nothing.

    RUN/checkpoints/step_00001000/model.safetensors      weights
                                  ema.safetensors        averaged weights
                                  optimizer.safetensors  PARAMETER.exp_avg, PARAMETER.exp_avg_sq, PARAMETER.step
                                  rng.safetensors        generator states
                                  projector.safetensors  REPA's projector, where a run has one
                                  state.json             step, samples seen, training seconds, shape of the data;
                                                         "run": the same in all checkpoints of a run;
                                                         "checksums": SHA-256 of each file above, by name;
                                                         "digest": SHA-256 of all else in this file

Nothing here is pickled, and nothing is read unchecked: a bit that flipped on the disk is an error that names the file.
Each .safetensors says in its metadata which file of which step of which run it is, and belongs nowhere else.
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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CheckpointError
from ..config.io import parse_json
from ..config.run import CONFIG
from ..files import TEMPORARY, flush

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
STATE = "state.json"
_CHECKSUMS, _DIGEST, _RUN, _STEP = "checksums", "digest", "run", "step"
_STEP_NAME = re.compile(r"step_(\d{8,})")


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, or is not what was written."""


class _Written(NamedTuple):
    """What the state says about the files beside it; all None in a checkpoint from before there was such a thing."""

    checksums: Mapping[str, str] | None
    step: int | None
    run: str | None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoint folders of a run, oldest first."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _STEP_NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    keep_every: int = 0,
) -> Path:
    """Writes one checkpoint and then removes all but the newest `keep`, and those of a multiple of `keep_every` steps.

    Everything goes into a temporary folder beside the others, is flushed to the disk and renamed: a checkpoint is there
    entirely or not at all, and no older one is touched before the new one is complete. A step that is there already is
    left as it is if it is whole; a damaged one makes room, see `newest_checkpoint`.

    Args:
        run_dir: folder of the run.
        step: optimiser steps done.
        tensors: file stem to named tensors, for instance {"model": model.state_dict()}.
        state: JSON values by names other than "step", "checksums" and "digest"; "run" marks the files, too.
        keep: how many checkpoints stay.
        keep_every: 0 keeps no others.

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
            contiguous = {name: tensor.detach().contiguous() for name, tensor in named.items()}
            save_file(contiguous, path, _label(path, step, state.get(_RUN)))
            flush(path)
            checksums[path.name] = _checksum(path)
        path = temporary / STATE
        content = {**state, _STEP: step, _CHECKSUMS: checksums}
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
        if not keep_every or int(old.name.removeprefix("step_")) % keep_every:
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
    _, written = _read_state(checkpoint)
    files = sorted(file.name for file in checkpoint.glob("*.safetensors"))
    for name in files if written.checksums is None else sorted(written.checksums):
        _check_tensors(checkpoint / name, written)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; a file of a checkpoint is compared with its checksum first.

    Raises:
        DamagedCheckpoint: missing, truncated, not safetensors, or not what was written; names the file.
    """
    with _advising(path.parent):
        _check_tensors(path, _read_state(path.parent)[1] if (path.parent / STATE).is_file() else None)
    return load_file(path)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a checkpoint folder, as `save_checkpoint` was given it.

    Files beside it that are no part of the checkpoint are named in a warning.

    Raises:
        DamagedCheckpoint: the state is missing or damaged, or a file that it has a checksum of is missing; names it.
    """
    with _advising(checkpoint):
        return _read_state(checkpoint)[0]


def _read_state(checkpoint: Path) -> tuple[dict[str, Any], _Written]:
    """The state, and what it says about the files beside it."""
    path = checkpoint / STATE
    try:
        state = parse_json(path.read_bytes())
        if not isinstance(state, dict):
            raise ValueError(f"expected an object, found {type(state).__name__}")
        digest, checksums, run = state.pop(_DIGEST, None), state.get(_CHECKSUMS), state.get(_RUN)
        if digest is None and checksums is None:
            _log_once(logging.INFO, f"{checkpoint} is from before checkpoints had checksums, and is read unchecked")
        elif digest != _digest(state):  # which a missing digest cannot equal
            raise ValueError("it does not fit its own digest")
        state.pop(_CHECKSUMS, None)
        step = state.get(_STEP)
        if (name := _STEP_NAME.fullmatch(checkpoint.name)) and step not in (None, int(name[1])):
            raise ValueError(f"it is that of step {step}, and the folder's name says {int(name[1])}")
        if checksums is None:
            return state, _Written(None, step, run)
        if not isinstance(checksums, dict) or not all(_is_file_name(name) for name in checksums):
            raise ValueError(f"its {_CHECKSUMS} are not by names of files")
        found = {file.name for file in checkpoint.iterdir()} - {STATE}
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"cannot read {path}: {error}") from error
    if missing := sorted(checksums.keys() - found):
        raise DamagedCheckpoint(f"{checkpoint} has lost {', '.join(missing)}")
    if extra := sorted(found - checksums.keys()):
        _log_once(logging.WARNING, f"{checkpoint} has files that were not saved with it: {', '.join(extra)}")
    return state, _Written(checksums, step, run)


def _is_file_name(name: str) -> bool:
    return name.endswith(".safetensors") and Path(name).name == name


def _label(path: Path, step: int | None, run: str | None) -> dict[str, str]:
    """What the metadata of a file say that it is."""
    return {"file": path.stem, "step": str(step), "run": str(run)}


def _check_tensors(path: Path, written: _Written | None) -> None:
    """Raises DamagedCheckpoint where a file is not what the state beside it says, or no complete safetensors."""
    try:
        if written is not None and written.checksums is not None:
            if path.name not in written.checksums:
                raise ValueError("it was not saved with this checkpoint")
            if _checksum(path) != written.checksums[path.name]:
                raise ValueError(f"it is damaged: its SHA-256 is not the one in {STATE}")
        with safe_open(path, "pt") as file:  # the header, and that the file is as long as it says
            label = file.metadata() or {}
        if written is None:
            return
        for name, expected in _label(path, written.step, written.run).items():
            # A file from before there were labels has none, in a checkpoint from before.
            if label.get(name, None if written.run is None else "unknown") not in (None, expected):
                raise ValueError(f"it belongs elsewhere: its {name} is {label.get(name, 'unknown')}, not {expected}")
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


def run_of(path: Path) -> Path | None:
    """The run that a run folder or checkpoint folder belongs to, or None for a lone file."""
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / CONFIG).is_file():
            return folder
    return None
