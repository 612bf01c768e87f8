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

Where processes hold parts of the weights, a folder ``model`` is in the place of ``model.safetensors`` (and so on), with
a file for each process, see `distributed.parts`.

Nothing here is pickled, and nothing is read unchecked: a bit that flipped on the disk is an error that names the file.
Each STEM.safetensors says in its metadata which file of which step of which run it is, and belongs nowhere else.
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
from types import MappingProxyType
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CheckpointError
from ..config.io import parse_json
from ..config.run import CONFIG
from ..distributed.parts import is_divided, own_files, read_parts, write_parts
from ..distributed.processes import ALONE, Processes
from ..files import TEMPORARY, flush, sha256

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
STATE = "state.json"
_SUFFIX = ".safetensors"
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


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where a run has the checkpoint of that step, or would have it."""
    return run_dir / FOLDER / f"step_{step:08d}"


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    keep_every: int = 0,
    processes: Processes = ALONE,
) -> Path:
    """Writes one checkpoint and then removes all but the newest `keep`, and those of a multiple of `keep_every` steps.

    Everything goes into a temporary folder beside the others, is flushed to the disk and renamed: a checkpoint is there
    entirely or not at all, and no older one is touched before the new one is complete. A step that is there already is
    left as it is if it is whole; a damaged one makes room, see `newest_checkpoint`.

    Args:
        run_dir: folder of the run.
        step: optimiser steps done.
        tensors: file stem to named tensors, for instance {"model": model.state_dict()}. Of those that are divided each
            process writes its part; all others are written by the first one, and are asked of no other.
        state: JSON values by names other than "step", "checksums" and "digest"; "run" marks the files, too.
        keep: how many checkpoints stay.
        keep_every: 0 keeps no others.
        processes: all of which call this.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written, for one of the processes; all of them raise
            it. The older checkpoints are intact.
    """
    target = checkpoint_path(run_dir, step)
    begun = processes.by_first(lambda: _begin(run_dir, target))
    if not begun:
        return target
    temporary = Path(begun)
    failed, checksums = "", {}
    try:
        divided = [stem for stem, named in tensors.items() if is_divided(named)]
        for stem in divided:  # all together, which fail together: first of all, as none may be missing in it
            write_parts(temporary / stem, tensors[stem], processes)
        for path in (path for stem in divided for path in own_files(temporary / stem, processes)):
            flush(path)
            checksums[path.relative_to(temporary).as_posix()] = sha256(path)
        for stem in (stem for stem in tensors if processes.first and stem not in divided):
            path = temporary / f"{stem}{_SUFFIX}"
            contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors[stem].items()}
            save_file(contiguous, path, _label(path, step, state.get(_RUN)))
            flush(path)
            checksums[path.name] = sha256(path)
    except (OSError, SafetensorError) as error:
        failed = str(error)
    found = [json.loads(text) for text in processes.texts(json.dumps((failed, checksums)))]

    def end() -> str:
        if failures := [failure for failure, _ in found if failure]:
            raise _not_saved(run_dir, target, temporary, failures[0])
        written = {**state, _STEP: step, _CHECKSUMS: {name: own[name] for _, own in found for name in sorted(own)}}
        _end(run_dir, target, temporary, written)
        for old in list_checkpoints(run_dir)[:-keep]:
            if not keep_every or int(old.name.removeprefix("step_")) % keep_every:
                shutil.rmtree(old, ignore_errors=True)
        return ""

    processes.by_first(end)
    return target


def _begin(run_dir: Path, target: Path) -> str:
    """The temporary folder of a checkpoint; nothing where that is there already."""
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}")
    if target.is_dir():
        try:
            check_checkpoint(target)
            return ""
        except DamagedCheckpoint as error:
            _set_aside(target, error)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise _not_saved(run_dir, target, temporary, str(error)) from error
    return os.fspath(temporary)


def _end(run_dir: Path, target: Path, temporary: Path, state: Mapping[str, Any]) -> None:
    """Writes what says that a checkpoint is complete, and gives it its name."""
    try:
        path = temporary / STATE
        path.write_text(json.dumps({**state, _DIGEST: _digest(state)}, indent=2) + "\n", encoding="utf-8")
        flush(path)
        for folder in (*(path for path in temporary.iterdir() if path.is_dir()), temporary):
            flush(folder)
        temporary.rename(target)
        flush(target.parent)
    except OSError as error:
        raise _not_saved(run_dir, target, temporary, str(error)) from error


def _not_saved(run_dir: Path, target: Path, temporary: Path, reason: str) -> CheckpointError:
    shutil.rmtree(temporary, ignore_errors=True)
    last = list_checkpoints(run_dir)
    kept = f"the last good checkpoint is {last[-1]}" if last else "there is no earlier checkpoint"
    return CheckpointError(f"cannot save {target}: {reason}; {kept}")


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
    for name in sorted(_files(checkpoint) if written.checksums is None else written.checksums):
        _check_tensors(checkpoint / name, written, part="/" in name)


def stems(checkpoint: Path) -> list[str]:
    """Of what a checkpoint folder holds tensors: "ema", "model", "optimizer" and so on."""
    return sorted({name.partition("/")[0].removesuffix(_SUFFIX) for name in _files(checkpoint)})


def tensors_path(checkpoint: Path, stem: str) -> Path:
    """Where a checkpoint folder has the tensors of that name, in a file or in a folder of parts; or would have it."""
    folder = checkpoint / stem
    return folder if folder.is_dir() else checkpoint / f"{stem}{_SUFFIX}"


def read_tensors(
    path: Path, like: Mapping[str, Tensor] = MappingProxyType({}), *, checked: bool = False
) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; a file of a checkpoint is compared with its checksum first.

    Args:
        path: the file, or the folder of parts that a checkpoint has in the place of one.
        like: what is divided among processes, and so may be read, see `read_parts`.
        checked: whether `check_checkpoint` has passed it.

    Raises:
        DamagedCheckpoint: missing, truncated, not safetensors, or not what was written; names the file.
    """
    if not checked:
        with _advising(path.parent):
            written = _read_state(path.parent)[1] if (path.parent / STATE).is_file() else None
            for file in sorted(path.glob(f"*{_SUFFIX}")) if path.is_dir() else [path]:
                _check_tensors(file, written, part=path.is_dir())
    return read_parts(path, like) if path.is_dir() else load_file(path)


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
        found = {path.name for path in checkpoint.iterdir() if not path.is_dir()} - {STATE} | _files(checkpoint)
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"cannot read {path}: {error}") from error
    if missing := sorted(checksums.keys() - found):
        raise DamagedCheckpoint(f"{checkpoint} has lost {', '.join(missing)}")
    if extra := sorted(found - checksums.keys()):
        _log_once(logging.WARNING, f"{checkpoint} has files that were not saved with it: {', '.join(extra)}")
    return state, _Written(checksums, step, run)


def _is_file_name(name: str) -> bool:
    parts = name.split("/")
    return name.endswith(_SUFFIX) and len(parts) <= 2 and all(Path(part).name == part for part in parts)


def _files(checkpoint: Path) -> set[str]:
    """Files of tensors in a checkpoint folder, and in folders in it."""
    found = (path for pattern in (f"*{_SUFFIX}", f"*/*{_SUFFIX}") for path in checkpoint.glob(pattern))
    return {path.relative_to(checkpoint).as_posix() for path in found if path.is_file()}


def _label(path: Path, step: int | None, run: str | None) -> dict[str, str]:
    """What the metadata of a file say that it is."""
    return {"file": path.stem, "step": str(step), "run": str(run)}


def _check_tensors(path: Path, written: _Written | None, *, part: bool = False) -> None:
    """Raises DamagedCheckpoint where a file is not what the state beside it says, or no complete safetensors.

    What is a part of tensors has no label, and is nothing without the state, which alone knows how many there are.
    """
    name = f"{path.parent.name}/{path.name}" if part else path.name
    try:
        if written is not None and written.checksums is not None:
            if name not in written.checksums:
                raise ValueError("it was not saved with this checkpoint")
            if sha256(path) != written.checksums[name]:
                raise ValueError(f"it is damaged: its SHA-256 is not the one in {STATE}")
        elif part:
            raise ValueError(
                f"it is a part of tensors, and no {STATE} says of which; read the checkpoint that it is of"
            )
        with safe_open(path, "pt") as file:  # the header, and that the file is as long as it says
            label = file.metadata() or {}
        if written is None or part:
            return
        for name, expected in _label(path, written.step, written.run).items():
            # A file from before there were labels has none, in a checkpoint from before.
            if label.get(name, None if written.run is None else "unknown") not in (None, expected):
                raise ValueError(f"it belongs elsewhere: its {name} is {label.get(name, 'unknown')}, not {expected}")
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedCheckpoint(f"cannot read {path}: {error}") from error


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
