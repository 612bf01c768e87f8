"""Motion in .npz files: joints or exponential maps, and what is known of the skeleton."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from ...errors import DataError
from ..config.data import DataConfig
from ..modality.base import check_fps
from ..modality.motion import Motion, Representation
from .media import class_files, read_all
from .memory import MemorySet, check_labels, naming
from .motion import Caption, Recording, check_values, common_skeleton, motion_set
from .npz import array_names, read_arrays

KINDS: tuple[Representation, ...] = ("positions", "rotations")
OTHERS = ("translations", "lengths", "labels", "captions", "fps", "parents", "offsets")
DEFAULT_FPS = 30.0


def is_motion_npz(name: str) -> bool:
    """Whether a file holds `KINDS`, or the first .npz file of a folder does."""
    if os.path.isdir(name):
        files = sorted(f"{at}/{file}" for at, _, found in os.walk(name) for file in found if file.endswith(".npz"))
        return bool(files) and is_motion_npz(files[0])
    return name.endswith(".npz") and not set(KINDS).isdisjoint(array_names(name))


def load_motion_npz(config: DataConfig) -> MemorySet:
    """A file of recordings, or a folder of files, whose sub-folders are classes.

    Arrays of a file; y is up:

    - ``positions``, of joints, (N, T, J, 3), or (T, J, 3) of one recording; or ``rotations``, exponential maps in
      radians of each joint within its parent's frame, with ``parents`` and ``offsets``, and ``translations`` (N, T, 3)
      of joint 0 where it moves.
    - ``lengths`` (N,), ``labels`` (N,), ``captions`` (N,) of strings, ``fps`` (30 if it is not there), ``parents``
      (J,) with -1 for joint 0, by which figures are drawn, ``offsets`` (J, 3).

    Raises:
        DataError: a file that is the only one cannot be used, none of several can, or their skeletons differ.
    """
    path = Path(config.data)
    if path.is_file():
        recordings, skeleton = _read(path, 0, config)
        names = [str(label) for label in range(max(recording.label for recording in recordings) + 1)]
        return motion_set(recordings, skeleton, config, class_names=names)
    files, names = class_files(path, {".npz"})

    def read(number: int) -> tuple[list[Recording], Motion]:
        try:
            return _read(*files[number], config)
        except DataError as error:
            raise ValueError(str(error).removeprefix(f"{files[number][0]}: ")) from error

    good, broken = read_all([str(file) for file, _ in files], read, what="motion files", workers=config.workers)
    skeleton = common_skeleton({str(files[number][0]): skeleton for number, (_, skeleton) in good.items()})
    recordings = [recording for found, _ in good.values() for recording in found]
    return motion_set(recordings, skeleton, config, class_names=names, broken=broken)


def _choose(names: Collection[str]) -> list[str]:
    kind = next((kind for kind in KINDS if kind in names), None)
    if kind is None:
        raise DataError(f"holds {list(names)}; expected motion under one of {KINDS}")
    return [kind, *(name for name in OTHERS if name in names)]


def _read(path: Path, label: int, config: DataConfig) -> tuple[list[Recording], Motion]:
    """What is in a file; the recordings of one without labels are of class `label`."""
    arrays = read_arrays(path, _choose, config)
    kind: Representation = "positions" if "positions" in arrays else "rotations"
    with naming(path):
        values = arrays[kind]
        values = values[None] if values.ndim == 3 else values
        if values.ndim != 4 or values.shape[-1] != 3 or not np.issubdtype(values.dtype, np.floating):
            raise DataError(
                f"{kind} are {values.dtype} {arrays[kind].shape}; expected floats (N, T, J, 3), or (T, J, 3)"
            )
        count, frames, joints, _ = values.shape
        if not values.size:
            raise DataError(f"{kind} have shape {arrays[kind].shape}; expected at least one joint in one frame")
        lengths = arrays.get("lengths", np.full(count, frames))
        if lengths.shape != (count,) or not np.issubdtype(lengths.dtype, np.integer):
            raise DataError(f"lengths are {lengths.dtype} {lengths.shape}; expected integers ({count},)")
        if (bad := np.flatnonzero((lengths < 1) | (lengths > frames))).size:
            raise DataError(f"length {lengths[bad[0]]} of recording {bad[0]}; expected 1 to {frames} frames")
        labels = check_labels(arrays.get("labels", np.full(count, label)), count).tolist()
        captions = arrays.get("captions")
        if captions is not None and (captions.shape != (count,) or captions.dtype.kind != "U"):
            raise DataError(f"captions are {captions.dtype} {captions.shape}; expected strings ({count},)")
        skeleton = _skeleton(kind, arrays, joints)
        flat = values.reshape(count, frames, -1)
        if kind == "rotations":
            root = arrays.get("translations", np.zeros((count, frames, 3), np.float32))
            root = root[None] if root.ndim == 2 else root
            if root.shape != (count, frames, 3):
                raise DataError(f"translations have shape {root.shape}; expected ({count}, {frames}, 3)")
            flat = np.concatenate([root, flat], -1)
        recordings = []
        for number in range(count):
            name = str(path) if count == 1 else f"{path}[{number}]"
            own = torch.from_numpy(flat[number, : lengths[number]].astype(np.float32).T)
            try:
                check_values(own)
            except ValueError as error:
                raise DataError(f"recording {number}: {error}") from error
            said = () if captions is None or not captions[number].strip() else (Caption(str(captions[number])),)
            recordings.append(Recording(name, own, labels[number], captions=said))
        return recordings, skeleton


def _skeleton(kind: Representation, arrays: dict[str, np.ndarray], joints: int) -> Motion:
    fps = arrays.get("fps", np.array(DEFAULT_FPS))
    if fps.size != 1 or not np.issubdtype(fps.dtype, np.number):
        raise DataError(f"fps is {fps.dtype} {fps.shape}; expected a number")
    parents, offsets = arrays.get("parents"), arrays.get("offsets")
    for name, array, shape in (("parents", parents, (joints,)), ("offsets", offsets, (joints, 3))):
        if array is None and kind == "rotations":
            raise DataError(f"rotations need {name} {shape}: without the skeleton nobody knows where joints are")
        if array is not None and (array.shape != shape or array.dtype.kind not in "iuf"):
            raise DataError(f"{name} are {array.dtype} {array.shape}; expected numbers {shape}, of {joints} joints")
    try:
        return Motion(
            representation=kind,
            fps=check_fps(float(fps.reshape(())), declared=True),
            parents=() if parents is None else tuple(int(parent) for parent in parents),
            offsets=() if offsets is None or kind == "positions" else tuple((x, y, z) for x, y, z in offsets.tolist()),
            reference=((0.0, 0.0),) * joints,
        )
    except ValueError as error:
        raise DataError(str(error)) from error
