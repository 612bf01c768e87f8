"""Image folders and torchvision's sets."""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...errors import DataError
from ..config.data import DataConfig
from ..spec import SampleSpec
from .base import SampleSet
from .buckets import BucketedSet, nearest_bucket
from .media import read_all
from .memory import MemorySet, check_fits, limit_bytes, memory_set
from .pixels import image_to_tensor
from .shards import window_of
from .streaming import DECODE_ERRORS, Source, StreamingSet, all_broken_message, describe

logger = logging.getLogger(__name__)

TORCHVISION = "torchvision:"
"""What a name of one of its sets starts with."""


def unpickles(name: str) -> bool:
    """Whether a set of that name unpickles files that nothing has checked: of LSUN a cache of keys beside the data.

    The others of torchvision read no pickles, or compare them with a checksum first, or let tensors through only.
    """
    return name.startswith(f"{TORCHVISION}LSUN")


def load_folder(config: DataConfig) -> SampleSet:
    """A folder with one sub-folder per class and images in it.

    A file whose header declares an image beyond `config.memory_limit_gb` counts as broken, before it is decoded.

    Raises:
        DataError: it is none.
    """
    from torchvision.datasets import ImageFolder

    path = Path(config.data)
    try:
        folder = ImageFolder(str(path))
    except (FileNotFoundError, OSError) as error:
        raise DataError(
            f"{path} is not an image folder (expected {path}/<class>/<image>.png or .jpg ...): {error}"
        ) from error
    files = folder.samples

    def load(i: int) -> tuple[Image.Image, int]:
        name, label = files[i]
        if not os.path.isfile(name):  # opening a pipe would wait for ever
            raise OSError("it is no file")
        with Image.open(name) as image:
            check_image(image, config)
            image.load()
            return image, label

    source = Source(len(files), load, lambda i: files[i][0], list(folder.classes))
    return from_source(source, config, default_channels=3)


def check_image(image: Image.Image, config: DataConfig) -> None:
    """Raises Image.DecompressionBombError for an image whose header declares more than the memory limit."""
    if config.memory_limit_gb == 0:  # everything is streamed; Pillow's own limit of 179 million pixels holds
        return
    # As decoded; in the channels wanted, and those as the floats that resizing takes.
    size = image.width * image.height * (len(image.getbands()) + (config.channels or 3) * (1 + 4))
    try:
        check_fits(f"an image of {image.width}x{image.height}", size, config, instead="")
    except DataError as error:
        raise Image.DecompressionBombError(str(error)) from error


def load_torchvision(config: DataConfig) -> SampleSet:
    """A classification set of torchvision, for instance ``torchvision:CIFAR10``; its own code reads the files.

    Raises:
        DataError: no such set, or it cannot be opened.
    """
    import torchvision.datasets as catalogue

    name = config.data.removeprefix(TORCHVISION)
    kind = getattr(catalogue, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, catalogue.VisionDataset)):
        raise DataError(f"torchvision has no data set {name!r}; it has: {', '.join(sorted(catalogue.__all__))}")
    parameters = inspect.signature(kind.__init__).parameters
    arguments: dict[str, Any] = {}
    if "root" in parameters:
        arguments["root"] = str(config.data_root)
    if "download" in parameters:
        arguments["download"] = config.download
    try:
        dataset: Any = kind(**arguments)
    except (RuntimeError, OSError, ValueError, TypeError, ImportError) as error:
        hint = "" if config.download else " (add --download to fetch it)"
        raise DataError(f"cannot open {config.data} under {config.data_root}: {error}{hint}") from error

    def load(i: int) -> tuple[Image.Image, int]:
        image, label = dataset[i]
        if not (isinstance(image, Image.Image) and isinstance(label, (int, np.integer))):
            raise DataError(
                f"{config.data} gives ({type(image).__name__}, {type(label).__name__}); "
                "expected an image and an integer class"
            )
        return image, int(label)

    classes = getattr(dataset, "classes", None) or [str(c) for c in range(_count_classes(dataset, load))]
    source = Source(len(dataset), load, lambda i: f"{config.data}[{i}]", [str(c) for c in classes])
    return from_source(source, config, default_channels=None)


def _count_classes(dataset: Any, load: Callable[[int], tuple[Image.Image, int]]) -> int:
    if isinstance(count := getattr(dataset, "num_classes", None), int):
        return count
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):
            return int(torch.as_tensor(labels).max()) + 1
    return max(load(i)[1] for i in range(len(dataset))) + 1


def from_source(
    source: Source[Image.Image], config: DataConfig, *, default_channels: int | None, files: Sequence[int] = ()
) -> SampleSet:
    """Decodes everything now if the samples fit into `config.memory_limit_gb`, else streams.

    Args:
        source: the images.
        config: channels and size wanted, the limit and the workers.
        default_channels: where the configuration leaves them open; None asks the first image, as is done for the size.
        files: samples of each of the files that hold many of them, which are streamed in any case.

    Raises:
        DataError: there are no images, or none that can be read.
    """
    if len(source) == 0:
        raise DataError(f"{config.data} holds no images")
    channels, size = config.channels or default_channels, config.size
    sizes = config.bucket_sizes
    if sizes:
        if files:
            raise DataError(f"--buckets: {config.data} is streamed; raise --memory-limit-gb")
        size = sizes[0]
    if channels is None or size is None:
        first = _first_readable(source)
        channels = channels or (1 if first.mode in ("1", "L", "I;16") else 3)
        size = size or (min(first.size),) * 2
    pixels = max(height * width for height, width in sizes or [size])
    if sizes:
        check_fits(
            f"{len(source)} images of up to {pixels} pixels", len(source) * channels * pixels, config, instead=""
        )

    def decode(i: int) -> tuple[Tensor, int]:
        image, label = source.load(i)
        own = sizes[nearest_bucket(image.height, image.width, sizes)] if sizes else size
        return image_to_tensor(image, own, channels), label

    if files or len(source) * channels * pixels > limit_bytes(config):
        logger.info("%s: %d images, decoded as training goes by %d workers", config.data, len(source), config.workers)
        return StreamingSet(
            spec=SampleSpec(channels, size),
            num_classes=len(source.class_names),
            class_names=source.class_names,
            source=Source(len(source), decode, source.name, source.class_names),
            workers=config.workers,
            prefetch=config.prefetch,
            files=files,
            window=window_of(files, config.shuffle_shards) if files else 1,
        )
    names = [source.name(i) for i in range(len(source))]
    good, broken = read_all(names, decode, what="image files", workers=config.workers)  # Pillow decodes without the GIL
    if not sizes:
        return _in_memory(list(good.values()), source, config, broken)
    parts = [[item for item in good.values() if tuple(item[0].shape[1:]) == own] for own in sizes]
    sets = [_in_memory(items, source, config, {}) for items in parts if items]
    logger.info("%s", ", ".join(f"{len(items)} images of {h}x{w}" for items, (h, w) in zip(parts, sizes, strict=True)))
    largest = max(sets, key=lambda part: math.prod(part.spec.extent))
    return BucketedSet(
        spec=largest.spec,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        broken=broken,
        parts=sets,
    )


def _in_memory(
    items: Sequence[tuple[Tensor, int]], source: Source[Image.Image], config: DataConfig, broken: dict[str, str]
) -> MemorySet:
    samples, labels = torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
    return memory_set(samples, labels, config, class_names=source.class_names, broken=broken)


def _first_readable(source: Source[Image.Image]) -> Image.Image:
    broken: dict[str, str] = {}
    for i in range(len(source)):
        try:
            return source.load(i)[0]
        except DataError:
            raise
        except DECODE_ERRORS as error:
            broken[source.name(i)] = describe(error)
    raise DataError(all_broken_message(broken, source.what))
