"""CIFAR-10 as JPEG in one file."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ...errors import DataError
from ..config.data import DataConfig
from .base import SampleSet
from .folders import from_source, load_torchvision
from .media import find_named
from .memory import MemorySet
from .npz import read_arrays
from .streaming import ImageSource

NAME = "cifar10"
FILE = "cifar10_jpeg.npz"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_ARRAYS = ("header", "train_body", "train_len", "train_y", "test_body", "test_len", "test_y")


def load_cifar10(config: DataConfig) -> SampleSet:
    """``cifar10_jpeg.npz`` under `--data-root` or $LAYERSYNC_DATA, else torchvision's CIFAR-10 there.

    The file holds the JPEGs of both splits, whose header they share.

    Raises:
        DataError: neither is there, or the file is damaged.
    """
    path = find_named(config, FILE)
    if path is None:
        return load_torchvision(dataclasses.replace(config, data="torchvision:CIFAR10"))
    return _load(path, config)


def _load(path: Path, config: DataConfig) -> SampleSet:
    def choose(names: object) -> list[str]:
        if missing := [name for name in _ARRAYS if name not in names]:  # type: ignore[operator]
            raise DataError(f"has no {missing}; expected {', '.join(_ARRAYS)}")
        return list(_ARRAYS)

    arrays = read_arrays(path, choose, config)
    header = arrays["header"].tobytes()
    spans: list[tuple[bytes, int, int, int, bool]] = []
    for split in ("train", "test"):
        lengths, labels = arrays[f"{split}_len"].astype(np.int64), arrays[f"{split}_y"].astype(np.int64)
        body, ends = arrays[f"{split}_body"].tobytes(), np.cumsum(lengths)
        fits = len(lengths) == len(labels) > 0 and (lengths > 0).all() and ends[-1] <= len(body)
        if not fits or not 0 <= labels.min() <= labels.max() < len(CLASSES):
            raise DataError(f"{path}: its arrays do not fit together; it is damaged")
        own = zip(ends - lengths, ends, labels, strict=True)
        spans += [(body, int(start), int(end), int(label), split == "test") for start, end, label in own]

    def load(i: int) -> tuple[Image.Image, int]:
        body, start, end, label, _ = spans[i]
        with Image.open(io.BytesIO(header + body[start:end])) as image:
            image.load()
            return image, label

    data = from_source(ImageSource(len(spans), load, lambda i: f"{path}[{i}]", CLASSES), config, default_channels=3)
    if isinstance(data, MemorySet):
        test = [span[4] for i, span in enumerate(spans) if f"{path}[{i}]" not in data.broken]
        data.test = torch.tensor(test)
    return data
