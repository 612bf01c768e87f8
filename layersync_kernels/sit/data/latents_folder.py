"""Latents that `layersync latents` wrote: numbered files of posteriors, and an index."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from ...errors import ConfigError, DataError
from ..config.data import DataConfig
from ..console import console
from ..files import atomic_path, write_json
from ..modality.audio import Sound
from ..modality.autoencoder import Autoencoder
from ..modality.latents import Latents
from ..modality.video import Video
from ..spec import SampleSpec
from .augment import mirror
from .base import SampleSet
from .latents_index import INDEX, LatentsIndex, shard_name
from .latents_set import LatentSet, ShardFiles, StreamedLatents
from .memory import limit_bytes
from .remote import ShardCache, is_url, read_url
from .shards import window_of

logger = logging.getLogger(__name__)


def is_latents_folder(name: str) -> bool:
    """Whether a folder of that name holds such latents, or a name is a URL, behind which nothing else is looked for."""
    if is_url(name):
        return not name.endswith(".tar")
    return len(name) < 4096 and (Path(name) / INDEX).is_file() and bool(list(Path(name).glob("latents_*.safetensors")))


def load_latents_folder(config: DataConfig) -> LatentSet | StreamedLatents:
    """A folder that `layersync latents` wrote.

    What is within `config.memory_limit_gb` is read now. More than that, and what is behind a URL, is read as training
    goes.

    Raises:
        DataError: it is not whole, damaged, or has no mirrored latents for --flip.
    """
    remote = is_url(config.data)
    place = f"{config.data.rstrip('/')}/{INDEX}"
    content = read_url(place) if remote else None
    try:
        index = LatentsIndex.parse(Path(place).read_bytes() if content is None else content)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {place}: {error}") from error
    if config.flip and not index.flip:
        raise DataError(f"{config.data} has no latents of mirrored samples, which --flip needs: write them with --flip")
    window = window_of(index.sizes, config.shuffle_shards)
    # A batch that passes from one window to the next reads of both.
    files = ShardFiles(config.data, index, limit=2 * window, cache=ShardCache.of(config))
    facts: dict[str, Any] = {
        "spec": SampleSpec.of(index.shape, variable=index.variable),
        "num_classes": index.num_classes,
        "class_names": list(index.class_names),
        "modality": dataclasses.replace(index.modality, container=config.video.video_format),
        "posterior": config.latent_sample == "posterior",
        "flip": config.flip,
    }
    if not remote:
        paths = [Path(files.place(number)) for number in range(index.files)]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise DataError(
                f"{config.data} lacks {len(missing)} of {index.files} files, such as {missing[0]}: "
                "run the command again"
            )
        if sum(path.stat().st_size for path in paths) <= limit_bytes(config):
            return LatentSet(**facts, parts=_in_memory(files))
        files.check()
    logger.info(
        "%s: %d latents in %d files, read as training goes by %d workers; %d files are shuffled together",
        *(config.data, index.samples, index.files, config.workers, window),
    )
    return StreamedLatents(**facts, files=files, window=window, workers=config.workers, prefetch=config.prefetch)


def _in_memory(files: ShardFiles) -> dict[str, Tensor]:
    pieces = [files.tensors(number) for number in range(files.index.files)]  # mapped: nothing but labels is read yet
    parts = {name: torch.cat([own[name] for own in pieces]) for name in sorted(files.index.parts)}
    if not all(bool(own.isfinite().all()) for own in parts.values()):
        raise DataError(f"{files.folder} holds NaN or infinity; write the latents anew")
    return parts


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
            there = LatentsIndex.parse(place.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {place}: {error}; choose another --out") from error
        if there != index:
            raise ConfigError(f"{folder} holds latents of something else, or other settings; choose another --out")
    else:
        write_json(place, {name: getattr(index, name) for name in LatentsIndex.__dataclass_fields__})
    for number in track(range(index.files), "latents", console=console, disable=not console.is_terminal):
        path = folder / shard_name(number)
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
