"""Motion in folders of BVH files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.data import DataConfig
from ..extras import optional_module
from ..modality.base import check_fps
from ..modality.motion import Motion
from ..modality.motion_kinematics import from_euler
from .media import class_files, mostly, read_all
from .memory import MemorySet, check_fits
from .motion import Recording, check_values, common_skeleton, motion_set

SUFFIXES = {".bvh"}


def is_bvh(name: str) -> bool:
    """Whether a folder has such files."""
    return mostly(name, SUFFIXES)


def load_bvh(config: DataConfig) -> MemorySet:
    """A folder of BVH files of one skeleton; its sub-folders are classes.

    Joints turn, and the first one moves; ends of limbs are joints that do not turn. Units are those of the files, y is
    up.

    Raises:
        DataError: no file can be read, or skeletons differ.
        ConfigError: bvhio is not installed.
    """
    parser = optional_module("bvhio", f"--data {config.data}: reading BVH files", "layersync_kernels[motion]")
    files, names = class_files(Path(config.data), SUFFIXES)

    def read(number: int) -> tuple[Recording, Motion]:
        path, label = files[number]
        check_fits(str(path), 4 * path.stat().st_size, config)  # text takes more than the float64 of its numbers
        values, skeleton = _read(path, parser)
        check_values(values)
        return Recording(str(path), values, label), skeleton

    good, broken = read_all([str(file) for file, _ in files], read, what="BVH files", workers=config.workers)
    skeleton = common_skeleton({recording.name: skeleton for recording, skeleton in good.values()})
    recordings = [recording for recording, _ in good.values()]
    return motion_set(recordings, skeleton, config, class_names=names, broken=broken)


def _read(path: Path, parser: Any) -> tuple[torch.Tensor, Motion]:
    """Values (3 + 3·J, T) and the skeleton of a file; raises anything where it is damaged."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    words = [line.split() for line in lines]
    start = words.index(["MOTION"]) + 1  # the parser would look for it for ever
    motion = [line for line, found in zip(lines[start:], words[start:], strict=True) if found]
    if len(motion) < 2 or not motion[0].split()[0] == "Frames:":
        raise ValueError("MOTION is not followed by 'Frames:' and 'Frame Time:'")
    tree = parser.readAsBvh(str(path), loadKeyFrames=False)
    parents: list[int] = []
    offsets: list[tuple[float, float, float]] = []
    channels: list[tuple[int, list[str]]] = []

    def walk(joint: Any, parent: int) -> None:
        own = len(parents)
        parents.append(parent)
        offsets.append(tuple(joint.Offset))
        channels.append((own, joint.Channels))
        for child in joint.Children:
            walk(child, own)
        if not joint.Children:
            parents.append(own)
            offsets.append(tuple(joint.EndSite))

    walk(tree.Root, -1)
    if tree.FrameCount < 1:
        raise ValueError(f"it declares {tree.FrameCount} frames; expected at least 1")
    table = np.loadtxt(motion[2 : 2 + tree.FrameCount], ndmin=2)
    width = sum(len(names) for _, names in channels)
    if table.shape != (tree.FrameCount, width):
        raise ValueError(f"it holds {table.shape} values, and declares {tree.FrameCount} frames of {width}")
    root, rotations = np.tile(offsets[0], (len(table), 1)), np.zeros((len(table), len(parents), 3))
    column = 0
    for joint, names in channels:
        part = table[:, column : column + len(names)]
        column += len(names)
        turns = [i for i, name in enumerate(names) if name.endswith("rotation")]
        if turns:
            rotations[:, joint] = from_euler("".join(names[i][0] for i in turns), part[:, turns])
        if joint == 0:
            for axis, letter in enumerate("XYZ"):
                if f"{letter}position" in names:
                    root[:, axis] = part[:, names.index(f"{letter}position")]
    values = np.concatenate([root, rotations.reshape(len(table), -1)], 1).astype(np.float32)
    skeleton = Motion(
        representation="rotations",
        fps=check_fps(round(1 / tree.FrameTime, 3), declared=True),
        parents=tuple(parents),
        offsets=((0.0, 0.0, 0.0), *offsets[1:]),
    )
    return torch.from_numpy(values.T.copy()), skeleton
