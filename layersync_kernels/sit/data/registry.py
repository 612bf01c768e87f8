"""Data sets by name. A new kind of data takes a module with its loader, and an entry in `KINDS`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ...errors import DataError
from ..config.data import DataConfig
from .arrays import load_mnist, load_npz
from .audio import FSDD, is_audio_folder, load_audio_folder, load_fsdd
from .base import SampleSet
from .cifar import NAME as CIFAR10
from .cifar import load_cifar10
from .folders import TORCHVISION, load_folder, load_torchvision
from .huggingface import PREFIX as HUGGINGFACE
from .huggingface import load_huggingface
from .latents import load_safetensors
from .latents_folder import is_latents_folder, load_latents_folder
from .memory import MemorySet
from .motion_bvh import is_bvh, load_bvh
from .motion_cmu import NAME as CMU_MOCAP
from .motion_cmu import load_cmu_mocap
from .motion_humanml3d import is_humanml3d, load_humanml3d
from .motion_npz import is_motion_npz, load_motion_npz
from .user import is_python_path, load_user
from .webdataset import is_webdataset, load_webdataset


class DataKind(NamedTuple):
    """A kind of data.

    Attributes:
        expected: how `DataConfig.data` names it, for the message about a name that no kind takes.
        takes: whether a name is of this kind.
        load: opens what `DataConfig.data` names, or raises DataError.
    """

    expected: str
    takes: Callable[[str], bool]
    load: Callable[[DataConfig], SampleSet]


def _file(suffix: str) -> Callable[[str], bool]:
    return lambda name: Path(name).suffix == suffix and os.path.isfile(name)  # Path.is_file raises on names too long


KINDS: list[DataKind] = [
    DataKind("mnist", lambda name: name == "mnist", load_mnist),
    DataKind(f"{TORCHVISION}NAME", lambda name: name.startswith(TORCHVISION), load_torchvision),
    DataKind(CIFAR10, lambda name: name == CIFAR10, load_cifar10),
    DataKind("a folder that `layersync latents` wrote", is_latents_folder, load_latents_folder),
    DataKind(FSDD, lambda name: name == FSDD, load_fsdd),
    DataKind("a folder of sounds", is_audio_folder, load_audio_folder),
    DataKind(CMU_MOCAP, lambda name: name == CMU_MOCAP, load_cmu_mocap),
    DataKind("a folder like that of HumanML3D", is_humanml3d, load_humanml3d),
    DataKind("a folder of .bvh files", is_bvh, load_bvh),
    DataKind("a folder or an .npz file of positions or rotations of joints", is_motion_npz, load_motion_npz),
    DataKind("tar files of WebDataset", is_webdataset, load_webdataset),
    DataKind(f"{HUGGINGFACE}NAME", lambda name: name.startswith(HUGGINGFACE), load_huggingface),
    DataKind("MODULE:FUNCTION", is_python_path, load_user),
    DataKind("an existing folder with one sub-folder per class", os.path.isdir, load_folder),
    DataKind("an existing .npz file", _file(".npz"), load_npz),
    DataKind("an existing .safetensors file", _file(".safetensors"), load_safetensors),
]
"""Asked in this order."""


def load_data(config: DataConfig, device: torch.device | None = None) -> SampleSet:
    """Opens what `config.data` names; the loaders in `KINDS` say what each kind has to hold.

    Args:
        config: the data and how to read them.
        device: where samples that are all in memory go, if they fit there (see `MemorySet.to`).

    Raises:
        DataError: nothing of that name, or its content cannot be used; the message says why.
    """
    for kind in KINDS:
        if kind.takes(config.data):
            data = kind.load(config)
            break
    else:
        raise DataError(f"no data named {config.data!r}: expected {', or '.join(kind.expected for kind in KINDS)}")
    if config.text_encoder is not None and data.text_width is None:
        raise DataError(f"--text-encoder {config.text_encoder}: {config.data} has no captions")
    if config.split != "all":
        data = _split(data, config)
    if isinstance(data, MemorySet) and device is not None:
        data.to(device)
    return data


def _split(data: SampleSet, config: DataConfig) -> SampleSet:
    if not isinstance(data, MemorySet):
        raise DataError(f"--split {config.split}: the data is streamed; raise --memory-limit-gb, or split its folder")
    test = data.test
    if test is None:  # a tenth
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        test = torch.zeros(len(data), dtype=torch.bool)
        test[order[: len(data) // 10]] = True
    wanted = (test if config.split == "test" else ~test).nonzero().flatten()
    if not len(wanted):
        raise DataError(f"--split {config.split}: none of the {len(data)} samples of {config.data} are in it")
    return data.subset(wanted)
