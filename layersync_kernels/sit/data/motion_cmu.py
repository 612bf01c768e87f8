"""The CMU motions that are used for predicting motion (Li et al. 2018, "Convolutional sequence to sequence model for
human dynamics"): exponential maps of 38 joints, at 120 frames a second.

The skeleton's tables are those of that paper's public code. https://mocap.cs.cmu.edu is the source of the recordings.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..config.data import DataConfig
from ..modality.motion import Motion
from ..modality.motion_kinematics import spin
from .media import ROOT, find_named
from .memory import MemorySet
from .motion import Recording, check_values, motion_set
from .npz import read_arrays

NAME = "cmu-mocap"
FILE = "cmu_mocap.npz"
ACTIONS = ("walking", "running", "jumping", "soccer", "basketball", "basketball_signal")
"""Those with recordings in both splits. Walks are in two folders, "walking" and "walking_extra"."""
FPS = 120.0
METRE = 0.45 * 100 / 2.54
"""In units of the files: inches times 0.45."""
WIDTH = 117
MAX_SPIN, MARGIN = 0.2, 4
"""Radians that a body may turn by within 1/120 s, and frames around such a moment that are left out too."""
SHORTEST = 32
"""Frames of a part of a recording that is used."""
# fmt: off
PARENTS = (
    -1, 0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 10, 11, 0, 13, 14, 15, 16, 17, 18, 15, 20, 21, 22, 23, 24, 25, 23, 27, 15, 29, 30,
    31, 32, 33, 34, 32, 36,
)
OFFSETS = (  # of each joint that is not where its parent is
    (2, (1.65674, -1.80282, 0.62477)), (3, (2.59720, -7.13576, 0)), (4, (2.49236, -6.84770, 0)),
    (5, (0.19704, -0.54136, 2.14581)), (6, (0, 0, 1.11249)), (8, (-1.61070, -1.80282, 0.62476)),
    (9, (-2.59502, -7.12977, 0)), (10, (-2.46780, -6.78024, 0)), (11, (-0.23024, -0.63258, 2.13368)),
    (12, (0, 0, 1.11569)), (14, (0.01961, 2.05450, -0.14112)), (15, (0.01021, 2.06436, -0.05921)),
    (17, (0.00713, 1.56711, 0.14968)), (18, (0.03429, 1.56041, -0.10006)), (19, (0.01305, 1.62560, -0.05265)),
    (21, (3.54205, 0.90436, -0.17364)), (22, (4.86513, 0, 0)), (23, (3.35554, 0, 0)), (25, (0.66117, 0, 0)),
    (26, (0.53306, 0, 0)), (28, (0.54120, 0, 0.54120)), (30, (-3.49802, 0.75994, -0.32616)), (31, (-5.02649, 0, 0)),
    (32, (-3.36431, 0, 0)), (34, (-0.73041, 0, 0)), (35, (-0.58887, 0, 0)), (37, (-0.59786, 0, 0.59786)),
)
# fmt: on


def load_cmu_mocap(config: DataConfig) -> MemorySet:
    """``cmu_mocap.npz`` under `--data-root` or $LAYERSYNC_DATA: an array (T, 117) for each recording, under
    ``data|cmu_mocap|SPLIT|ACTION|NAME.txt``, of position, then 38 exponential maps.

    Raises:
        DataError: the file is not there, or it cannot be used.
    """
    path = _find(config)
    arrays = read_arrays(path, lambda names: [name for name in names if _parse(name)], config)
    if not arrays:
        raise DataError(f"{path} holds no array data|cmu_mocap|SPLIT|ACTION|NAME.txt of the actions {ACTIONS}")
    recordings = []
    for name, array in sorted(arrays.items()):
        split, action = _parse(name) or ("", "")
        if array.ndim != 2 or array.shape[1] != WIDTH:
            raise DataError(
                f"{path}: {name} has shape {array.shape}; expected (T, {WIDTH}), of CMU's {len(PARENTS)} joints"
            )
        values = torch.from_numpy(array[1:].astype(np.float32)).T.contiguous()  # the first frame is the pose of rest
        values[:3] /= METRE
        values[3:] *= -1  # exponential maps of transposed matrices
        try:
            check_values(values)
        except ValueError as error:
            raise DataError(f"{path}: {name}: {error}") from error
        for part in _unbroken(values):
            recordings.append(Recording(name, part, ACTIONS.index(action), test=split == "test"))
    skeleton = Motion(
        representation="rotations",
        fps=FPS,
        parents=PARENTS,
        offsets=tuple((x / METRE, y / METRE, z / METRE) for x, y, z in map(_offset, range(len(PARENTS)))),
    )
    return motion_set(recordings, skeleton, config, class_names=ACTIONS)


def _unbroken(values: Tensor) -> list[Tensor]:
    """The parts of a recording (F, T) between frames in which the body turns over at once: walks around corners have
    such, where angles were converted at a singularity.
    """
    spins = np.flatnonzero(spin(values[3:6].T.numpy()) > MAX_SPIN) + 1
    bad = np.unique(np.clip(spins[:, None] + np.arange(-MARGIN, MARGIN + 1), 0, values.shape[1] - 1))
    edges = [-1, *bad.tolist(), values.shape[1]]
    return [values[:, a + 1 : b] for a, b in itertools.pairwise(edges) if b - a - 1 >= SHORTEST]


def _offset(joint: int) -> tuple[float, float, float]:
    return dict(OFFSETS).get(joint, (0.0, 0.0, 0.0))


def _find(config: DataConfig) -> Path:
    place = find_named(config, FILE)
    if place is None:
        raise DataError(
            f"--data {NAME}: no {FILE} in --data-root {config.data_root} or ${ROOT}; name its folder by either"
        )
    return place


def _parse(name: str) -> tuple[str, str] | None:
    """The split and the action of an array's name."""
    parts = name.split("|")
    if len(parts) != 5 or parts[2] not in ("train", "test"):
        return None
    action = parts[3].removesuffix("_extra")
    return (parts[2], action) if action in ACTIONS else None
