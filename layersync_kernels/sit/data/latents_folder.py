"""Latents that `layersync latents` wrote: numbered files of posteriors, and an index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import ConfigError, DataError
from ..batch import Batch, Condition, within_lengths
from ..config.data import DataConfig
from ..config.io import build, parse_json
from ..console import console
from ..files import atomic_path, write_json
from ..modality.audio import Sound
from ..modality.autoencoder import Autoencoder
from ..modality.base import check_fps
from ..modality.latents import Latents
from ..modality.video import Video
from ..spec import SampleSpec
from .augment import mirror
from .base import EpochShuffle, SampleSet, seeded
from .memory import check_fits

INDEX = "index.json"
_PARTS = ("mean", "std", "mean_mirrored", "std_mirrored", "labels", "lengths")


@dataclass(frozen=True)
class LatentsIndex:
    """What ``index.json`` says.

    Attributes:
        source: the data.
        autoencoder: its name.
        of: the modality that it encodes.
        samples: how many there are.
        shard: how many are in a file.
        flip: whether the latents of mirrored samples are there too.
        shape: of a sample's latents, (c, ...).
        variable: whether they have lengths.
        num_classes, class_names: of the data.
        shift, scale: per channel, or one for all: a model's latents are (latents - shift) * scale.
        sample_rate: of sounds.
        fps: of films, before they were encoded.
    """

    source: str
    autoencoder: str
    of: str
    samples: int
    shard: int
    flip: bool
    shape: tuple[int, ...]
    variable: bool
    num_classes: int
    class_names: tuple[str, ...]
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    sample_rate: int
    fps: float = Latents.fps

    def __post_init__(self) -> None:
        if min(self.samples, self.shard, self.num_classes) < 1 or not all(self.scale):
            raise ValueError("samples, shard, num_classes and scale are positive numbers")
        SampleSpec.of(self.shape)
        check_fps(self.fps)

    @property
    def files(self) -> int:
        """How many there are."""
        return -(-self.samples // self.shard)


def is_latents_folder(name: str) -> bool:
    """Whether a folder of that name holds such latents."""
    return len(name) < 4096 and (Path(name) / INDEX).is_file() and bool(list(Path(name).glob("latents_*.safetensors")))


@dataclass(kw_only=True)
class LatentSet(SampleSet):
    """Posteriors of an autoencoder, all in memory; each time a sample is taken for training it is drawn anew.

    Attributes:
        parts: "mean" and "std" (N, c, ...), those "_mirrored", "labels" (N,) and "lengths" (N,).
        posterior: whether samples are drawn; else they are the means.
        flip: whether half of a batch are latents of mirrored samples.
    """

    parts: dict[str, Tensor]
    posterior: bool
    flip: bool

    def __len__(self) -> int:
        return len(self.parts["mean"])

    def take(self, index: Tensor) -> Batch:
        """See `SampleSet.take`; the means, not mirrored."""
        return self._batch(index, None)

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Batch]:
        """See `SampleSet.batches`; what is drawn follows from the seed and the position."""
        shuffle = EpochShuffle(len(self), seed)
        while True:
            yield self._batch(shuffle.indices(start, batch_size), seeded(seed, start, 1))
            start += batch_size

    def _batch(self, index: Tensor, generator: torch.Generator | None) -> Batch:
        mean = self.parts["mean"][index].float()
        std = self.parts["std"][index].float()
        mirrored = None
        if self.flip and generator is not None:
            mirrored = torch.rand(len(index), *[1] * (mean.ndim - 1), generator=generator) < 0.5
            mean = torch.where(mirrored, self.parts["mean_mirrored"][index].float(), mean)
            std = torch.where(mirrored, self.parts["std_mirrored"][index].float(), std)
        if self.posterior and generator is not None:
            mean = mean + std * torch.randn(mean.shape, generator=generator)
        samples = self.modality.normalise(mean)
        lengths = self.parts["lengths"][index] if "lengths" in self.parts else None
        if lengths is not None:
            samples = torch.where(within_lengths(lengths, samples), samples, 0)
        return Batch(samples, Condition(self.parts["labels"][index], lengths), index, mirrored)


def load_latents_folder(config: DataConfig) -> LatentSet:
    """A folder that `layersync latents` wrote.

    Raises:
        DataError: it is not whole, damaged, more than the memory limit, or has no mirrored latents for --flip.
    """
    folder = Path(config.data)
    try:
        index = build(LatentsIndex, parse_json((folder / INDEX).read_bytes()))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {folder / INDEX}: {error}") from error
    paths = [folder / f"latents_{number:05d}.safetensors" for number in range(index.files)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise DataError(
            f"{folder} lacks {len(missing)} of {index.files} files, such as {missing[0]}: run the command again"
        )
    if config.flip and not index.flip:
        raise DataError(f"{folder} has no latents of mirrored samples, which --flip needs: write them with --flip")
    check_fits(f"{folder}", sum(path.stat().st_size for path in paths), config, instead="")
    pieces: dict[str, list[Tensor]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in _PARTS:
                        pieces.setdefault(name, []).append(file.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
    parts = {name: torch.cat(own) for name, own in pieces.items()}
    wanted = {"mean", "std", "labels"} | ({"lengths"} if index.variable else set())
    fits = wanted <= parts.keys() and all(len(own) == index.samples for own in parts.values())
    if not fits or tuple(parts["mean"].shape[1:]) != index.shape or parts["std"].shape != parts["mean"].shape:
        raise DataError(f"{folder}: the files do not fit {INDEX}; they are damaged")
    labels = parts["labels"]
    if labels.dtype != torch.int64 or not 0 <= int(labels.min()) <= int(labels.max()) < index.num_classes:
        raise DataError(f"{folder}: labels are not those of {index.num_classes} classes")
    if not all(bool(own.isfinite().all()) for own in parts.values()):
        raise DataError(f"{folder} holds NaN or infinity; write the latents anew")
    channels = index.shape[0]
    mean = index.shift * channels if len(index.shift) == 1 else index.shift
    std = tuple(1 / factor for factor in (index.scale * channels if len(index.scale) == 1 else index.scale))
    modality = Latents(
        mean=mean,
        std=std,
        of=index.of,
        autoencoder=index.autoencoder,
        sample_rate=index.sample_rate,
        fps=index.fps,
    )
    return LatentSet(
        spec=SampleSpec.of(index.shape, variable=index.variable),
        num_classes=index.num_classes,
        class_names=list(index.class_names),
        modality=modality,
        parts=parts,
        posterior=config.latent_sample == "posterior",
        flip=config.flip,
    )


def write_latents(
    autoencoder: Autoencoder, data: SampleSet, folder: Path, *, source: str, flip: bool, shard: int, batch_size: int
) -> LatentsIndex:
    """Encodes a data set into a folder; files that are there are left as they are.

    Args:
        autoencoder: of what the data holds.
        data: pixels, waveforms or films.
        folder: for ``index.json`` and ``latents_00000.safetensors`` and so on, in fp16.
        source: what the data is called.
        flip: also encode mirrored samples.
        shard: samples in a file.
        batch_size: samples at a time.

    Raises:
        ConfigError: the folder holds latents of something else; the data is not what the autoencoder encodes, or of
            a size that it does not give back.
        DataError: latents that are not finite in fp16.
    """
    kind = data.modality.kind
    if kind != autoencoder.of:
        hint = "; give --sound waveform" if autoencoder.of == "waveform" and kind == "mel" else ""
        raise ConfigError(f"{source} holds {kind}, and {autoencoder.name} encodes {autoencoder.of}{hint}")
    rate = data.modality.sample_rate if isinstance(data.modality, Sound) else 44_100
    if autoencoder.sample_rate not in (None, rate):
        raise ConfigError(
            f"{autoencoder.name} encodes {autoencoder.sample_rate} Hz: --sample-rate {autoencoder.sample_rate}"
        )
    if flip and kind == "waveform":
        raise ConfigError("--flip: sounds have no mirror image")
    first, _ = _encoded(autoencoder, data, torch.arange(1), mirrored=False)
    extent = tuple(autoencoder.decode(first.float()).shape[2:])
    if kind != "waveform" and extent != data.spec.extent:  # whose last moments may be shorter than a latent
        size, given = (" x ".join(map(str, numbers)) for numbers in (extent, data.spec.extent))
        option = f"--frames {extent[0]}" if extent[1:] == data.spec.extent[1:] else "other sizes"
        raise ConfigError(f"{autoencoder.name} keeps {size} of samples of {given}, and loses the rest; give {option}")
    index = LatentsIndex(
        source=source,
        autoencoder=autoencoder.name,
        of=autoencoder.of,
        samples=len(data),
        shard=shard,
        flip=flip,
        shape=tuple(first.shape[1:]),
        variable=data.spec.variable,
        num_classes=data.num_classes,
        class_names=tuple(data.class_names),
        shift=tuple(autoencoder.shift.tolist()),
        scale=tuple(autoencoder.scale.tolist()),
        sample_rate=rate,
        fps=data.modality.fps if isinstance(data.modality, Video) else Latents.fps,
    )
    place = folder / INDEX
    if place.exists():
        try:
            there = build(LatentsIndex, parse_json(place.read_bytes()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {place}: {error}; choose another --out") from error
        if there != index:
            raise ConfigError(f"{folder} holds latents of something else, or other settings; choose another --out")
    else:
        write_json(place, {name: getattr(index, name) for name in LatentsIndex.__dataclass_fields__})
    for number in track(range(index.files), "latents", console=console, disable=not console.is_terminal):
        path = folder / f"latents_{number:05d}.safetensors"
        if path.is_file():
            continue
        numbers = torch.arange(number * shard, min((number + 1) * shard, len(data)))
        save_shard(path, _shard(autoencoder, data, numbers, flip=flip, batch_size=batch_size, index=index))
    return index


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a file of latents, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _shard(
    autoencoder: Autoencoder, data: SampleSet, numbers: Tensor, *, flip: bool, batch_size: int, index: LatentsIndex
) -> dict[str, Tensor]:
    pieces: dict[str, list[Tensor]] = {}
    for own in numbers.split(batch_size):
        for suffix in ("", "_mirrored") if flip else ("",):
            mean, std = _encoded(autoencoder, data, own, mirrored=bool(suffix))
            pieces.setdefault(f"mean{suffix}", []).append(mean)
            pieces.setdefault(f"std{suffix}", []).append(std)
        condition = data.take(own).condition
        pieces.setdefault("labels", []).append(condition.labels.cpu())
        if condition.lengths is not None:
            ratio = index.shape[1] / data.spec.extent[0]
            pieces.setdefault("lengths", []).append((condition.lengths.cpu() * ratio).ceil().long().clamp_min(1))
    return {name: torch.cat(own).contiguous() for name, own in pieces.items()}


def _encoded(autoencoder: Autoencoder, data: SampleSet, index: Tensor, *, mirrored: bool) -> tuple[Tensor, Tensor]:
    samples = data.modality.restore(data.take(index).samples)
    mean, std = (part.half().cpu() for part in autoencoder.encode(mirror(samples) if mirrored else samples))
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise DataError(f"latents of samples from {int(index[0])} on are not finite in fp16")
    return mean, std
