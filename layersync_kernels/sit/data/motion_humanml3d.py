"""Motion in the folder layout of HumanML3D."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ...errors import DataError
from ..config.data import DataConfig
from ..modality.motion import HUMANML3D_PARENTS, HUMANML3D_WIDTH, Motion
from .media import read_all
from .memory import MemorySet, check_fits
from .motion import Caption, Recording, check_values, motion_set

FEATURES, TEXTS = "new_joint_vecs", "texts"
SPLITS = {"train": False, "val": True, "test": True}
FPS = 20.0


def is_humanml3d(name: str) -> bool:
    """Whether a folder has features of that name in it."""
    try:
        return (Path(name) / FEATURES).is_dir()
    except (OSError, ValueError):
        return False


def load_humanml3d(config: DataConfig) -> MemorySet:
    """A folder with ``new_joint_vecs/ID.npy`` (T, 263), ``texts/ID.txt``, and lists of IDs in ``train.txt``,
    ``val.txt`` and ``test.txt``, of which the last two are not trained on with `--split train`.

    A line of a text is ``caption#tokens#start#end``, in seconds, 0 and 0 for all of it. Every caption is a sample,
    where captions are read. ``Mean.npy`` and ``Std.npy`` replace the statistics of the training split.

    Raises:
        DataError: no list, or none of the recordings can be read.
    """
    folder = Path(config.data)
    ids: dict[str, bool] = {}
    for split, held in SPLITS.items():
        if (listed := folder / f"{split}.txt").is_file():
            ids |= dict.fromkeys(listed.read_text(encoding="utf-8").split(), held)
    if not ids:
        raise DataError(f"{folder} has no recordings in train.txt, val.txt or test.txt; expected one ID a line")
    names = list(ids)

    def read(number: int) -> Recording:
        name = names[number]
        if Path(name).name != name:
            raise ValueError("it is no name of a file")
        values = torch.from_numpy(_read_array(folder / FEATURES / f"{name}.npy", config).astype(np.float32))
        if values.ndim != 2 or values.shape[1] != HUMANML3D_WIDTH:
            raise ValueError(
                f"it has shape {tuple(values.shape)}; expected (T, {HUMANML3D_WIDTH}), of HumanML3D's body"
            )
        check_values(values.T)
        captions = () if config.text_encoder is None else _captions(folder / TEXTS / f"{name}.txt")
        return Recording(name, values.T.contiguous(), test=ids[name], captions=captions)

    good, broken = read_all(names, read, what="recordings", workers=config.workers)
    skeleton = Motion(representation="humanml3d", fps=FPS, parents=HUMANML3D_PARENTS)
    return motion_set(
        list(good.values()),
        skeleton,
        config,
        class_names=["motion"],
        broken=broken,
        statistics=_statistics(folder, config),
    )


def _statistics(folder: Path, config: DataConfig) -> tuple[Tensor, Tensor] | None:
    if not all((folder / name).is_file() for name in ("Mean.npy", "Std.npy")):
        return None
    mean, std = (torch.from_numpy(_read_array(folder / name, config)).double() for name in ("Mean.npy", "Std.npy"))
    for name, part in (("Mean.npy", mean), ("Std.npy", std)):
        if part.shape != (HUMANML3D_WIDTH,) or not part.isfinite().all() or (name == "Std.npy" and (part <= 0).any()):
            raise DataError(f"{folder / name} has shape {tuple(part.shape)}; expected ({HUMANML3D_WIDTH},), finite")
    return mean, std


def _read_array(path: Path, config: DataConfig) -> np.ndarray:
    """A .npy file of numbers, whose size is checked first."""
    check_fits(str(path), path.stat().st_size, config)
    return npy.read_array(io.BytesIO(path.read_bytes()), allow_pickle=False)


def _captions(path: Path) -> tuple[Caption, ...]:
    """Raises ValueError where there are none."""
    captions = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text, *fields = line.split("#")
        if text.strip():
            start, end = (float(field) for field in fields[1:3]) if len(fields) >= 3 else (0.0, 0.0)
            whole = not 0 <= start < end  # NaN, which the lists have in places, too
            captions.append(Caption(text.strip()) if whole else Caption(text.strip(), start, end))
    if not captions:
        raise ValueError(f"{path.name} holds no caption")
    return tuple(captions)
