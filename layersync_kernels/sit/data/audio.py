"""Sounds: folders of recordings, and spoken digits."""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import tempfile
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from ...errors import DataError
from ..config.data import DataConfig
from ..extras import optional_module
from ..files import TEMPORARY
from ..modality.audio import INSTALL, Mel, Sound, Waveform, resampled
from ..modality.base import channel_statistics
from ..spec import SampleSpec
from .media import class_files, find_named, mostly, read_all
from .memory import MemorySet, check_fits
from .npz import read_arrays

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"})
FSDD = "fsdd"
FSDD_FILE = "fsdd.npz"
FSDD_FOLDER = "free-spoken-digit-dataset"
FSDD_URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/heads/master.zip"
FSDD_RATE = 8000
FSDD_TEST_TAKES = 5
"""Takes 0 to 4 of each speaker and digit are the published test split."""
SHORTER = "; take fewer or shorter clips (--clip-seconds, --clips-per-sound), or a lower --sample-rate"


@dataclass(frozen=True)
class Recording:
    """A sound that has been read.

    Attributes:
        name: for messages.
        sound: float32 (L,), mono, in [-1, 1].
        rate: samples a second.
        label: its class.
        test: whether it is of a published test split; None: there is none.
    """

    name: str
    sound: np.ndarray
    rate: int
    label: int
    test: bool | None = None


def is_audio_folder(name: str) -> bool:
    """Whether a folder has sounds in it."""
    return mostly(name, SUFFIXES)


def load_audio_folder(config: DataConfig) -> MemorySet:
    """A folder of sounds (wav, flac, ogg, mp3, aiff), a sub-folder for each class.

    Several channels are mixed down. A file that cannot be read, that holds NaN or nothing, counts as broken. Of a file
    no more is read than its clips take.

    Raises:
        DataError: none can be read, or they are more than the memory limit.
    """
    soundfile = optional_module("soundfile", f"--data {config.data}", INSTALL)
    files, classes = class_files(Path(config.data), SUFFIXES)
    mixed: list[str] = []
    held, lock = 0, threading.Lock()

    def read(number: int) -> Recording:
        nonlocal held
        path, label = files[number]
        sound, rate, channels = _read(soundfile, path, path.name, config)
        with lock:
            held += sound.nbytes
            check_fits(f"sounds up to {path.name}", held, config, instead=SHORTER)
        if channels > 1:
            mixed.append(path.name)
        return Recording(str(path), sound, rate, label)

    good, broken = read_all([str(path) for path, _ in files], read, what="sound files", workers=config.workers)
    if mixed:
        logger.info("%d of %d sounds have several channels and were mixed down", len(mixed), len(files))
    return audio_set(list(good.values()), config, class_names=classes, broken=broken)


def _read(soundfile: Any, source: Any, name: str, config: DataConfig) -> tuple[np.ndarray, int, int]:
    """Mono float32 (L,), rate and channels; raises ValueError for what is no sound."""
    audio = config.audio
    with soundfile.SoundFile(source) as file:
        frames, channels, rate = max(file.frames, 0), file.channels, int(file.samplerate)
        if audio.clips_per_sound:
            frames = min(frames, audio.clips_per_sound * math.ceil(audio.clip_seconds * rate) + 1)
        check_fits(f"{name}, {frames} samples of {channels} channels", 4 * frames * channels, config, instead=SHORTER)
        sound = file.read(frames, dtype="float32", always_2d=True)
    if not len(sound):
        raise ValueError("it holds no samples")
    if not np.isfinite(sound).all():
        raise ValueError("it holds NaN or infinity")
    return sound.mean(1, dtype=np.float32), rate, channels


def load_fsdd(config: DataConfig) -> MemorySet:
    """The Free Spoken Digit Dataset: 3,000 digits of six speakers at 8 kHz, takes 0 to 4 being its test split.

    ``fsdd.npz`` or the recordings of https://github.com/Jakobovski/free-spoken-digit-dataset, under `--data-root` or
    $LAYERSYNC_DATA; with --download the latter are fetched.

    Raises:
        DataError: it is not there, or cannot be used.
    """
    place = find_named(config, FSDD_FILE, FSDD_FOLDER)
    if place is None and config.download:
        place = _download(config.data_root)
    if place is None:
        raise DataError(
            f"--data {FSDD}: neither {FSDD_FILE} nor {FSDD_FOLDER}/ in --data-root {config.data_root} or "
            "$LAYERSYNC_DATA; name its folder, or add --download to fetch it (16 MB)"
        )
    digits = [str(digit) for digit in range(10)]
    broken: dict[str, str] = {}
    recordings: Sequence[Recording]
    if place.is_dir():
        recordings, broken = _fsdd_folder(place, config)
    else:
        recordings = _fsdd_arrays(place, config)
    return audio_set(recordings, config, class_names=digits, broken=broken)


def _fsdd_arrays(path: Path, config: DataConfig) -> list[Recording]:
    wanted = ("x", "n", "digit", "take")

    def choose(names: Any) -> list[str]:
        if missing := [name for name in wanted if name not in names]:
            raise DataError(f"has no {missing}; expected sounds in 'x', their lengths 'n', 'digit' and 'take'")
        return list(wanted)

    sounds, counts, labels, takes = read_arrays(path, choose, config).values()
    whole = all(array.ndim == 1 and array.dtype.kind in "iu" for array in (sounds, counts, labels, takes))
    fits = whole and sounds.dtype == np.int16 and 0 < len(counts) == len(labels) == len(takes)
    if not (
        fits
        and 1 <= counts.min() <= counts.max() <= len(sounds)
        and 0 <= labels.min() <= labels.max() < 10
        and int(counts.astype(np.int64).sum()) == len(sounds)
    ):
        raise DataError(f"{path}: its arrays do not fit together; it is damaged")
    counts = counts.astype(np.int64)
    ends = np.cumsum(counts)
    return [
        Recording(
            f"{path}[{i}]",
            sounds[end - count : end].astype(np.float32) / 32768,
            FSDD_RATE,
            int(label),
            bool(take < FSDD_TEST_TAKES),
        )
        for i, (end, count, label, take) in enumerate(zip(ends, counts, labels, takes, strict=True))
    ]


def _fsdd_folder(folder: Path, config: DataConfig) -> tuple[list[Recording], dict[str, str]]:
    """Of files named DIGIT_SPEAKER_TAKE.wav."""
    soundfile = optional_module("soundfile", f"--data {FSDD}", INSTALL)
    files = sorted(folder.rglob("*.wav"))

    def read(number: int) -> Recording:
        path = files[number]
        digit, _, take = path.stem.split("_")
        sound, rate, _ = _read(soundfile, path, path.name, config)
        if not 0 <= int(digit) < 10:
            raise ValueError(f"its name says digit {digit}")
        return Recording(path.name, sound, rate, int(digit), int(take) < FSDD_TEST_TAKES)

    good, broken = read_all([str(path) for path in files], read, what="recordings", workers=config.workers)
    return list(good.values()), broken


def _download(root: Path) -> Path:
    """The recordings alone, into a folder under `root`, which is there when all of them are."""
    try:
        with urllib.request.urlopen(FSDD_URL) as answer:
            archive = zipfile.ZipFile(io.BytesIO(answer.read()))
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=root) as temporary:
            folder = Path(temporary) / FSDD_FOLDER
            folder.mkdir()
            for member in archive.infolist():
                path = PurePosixPath(member.filename)
                if path.suffix == ".wav" and path.parent.name == "recordings":
                    (folder / path.name).write_bytes(archive.read(member))
            if not any(folder.iterdir()):
                raise ValueError("it holds no recordings")
            folder.rename(root / FSDD_FOLDER)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot download {FSDD_URL}: {error}") from error
    return root / FSDD_FOLDER


def audio_set(
    recordings: Sequence[Recording],
    config: DataConfig,
    *,
    class_names: Sequence[str],
    broken: dict[str, str] | None = None,
) -> MemorySet:
    """Cuts recordings into clips and makes samples of them, normalised by those that are not for tests.

    Args:
        recordings: at least one.
        config: of the clips, the spectrograms and the memory.
        class_names: one a class.
        broken: what could not be read, by name.

    Raises:
        DataError: more than the memory limit.
    """
    audio = config.audio
    rate = audio.sample_rate or recordings[0].rate
    size = max(1, round(audio.clip_seconds * rate))
    modality: Sound
    if audio.sound == "mel":
        window, hop = (max(2, round(ms * rate / 1000)) for ms in (audio.window_ms, audio.hop_ms))
        try:
            modality = Mel(sample_rate=rate, window=window, hop=hop, bands=audio.mel_bins)
        except ValueError as error:
            raise DataError(f"--mel-bins, --window-ms and --hop-ms at {rate} samples a second: {error}") from error
    else:
        modality = Waveform(sample_rate=rate)
    values, owners = [], []
    total = 0
    for number, recording in enumerate(recordings):
        longer = math.ceil(len(recording.sound) * rate / recording.rate)
        check_fits(f"{recording.name} at {rate} samples a second", 4 * longer, config, instead=SHORTER)
        sound = resampled(recording.sound, recording.rate, rate)
        clips = -(-len(sound) // size) if audio.clips_per_sound == 0 else audio.clips_per_sound
        for start in range(0, min(len(sound), clips * size), size):
            clip = torch.from_numpy(sound[start : start + size])
            if audio.fixed_length:
                clip = torch.nn.functional.pad(clip, (0, size - len(clip)))
            values.append(modality.encode(clip))
            owners.append(number)
            total += values[-1].numel() * 4
        check_fits(f"{len(values)} clips of {number + 1} sounds", total, config, instead=SHORTER)
    known = [recordings[owner].test for owner in owners]
    test = torch.tensor([bool(own) for own in known]) if any(own is not None for own in known) else None
    training = [value for value, own in zip(values, known, strict=True) if not own] or values
    mean, std = channel_statistics(training)
    modality = dataclasses.replace(modality, mean=mean, std=std)
    lengths = torch.tensor([value.shape[1] for value in values])
    extent = int(lengths.max())
    check_fits(f"{len(values)} clips", 4 * len(values) * len(mean) * extent, config, instead=SHORTER)
    samples = torch.zeros(len(values), len(mean), extent)
    for row, value in zip(samples, values, strict=True):
        row[:, : value.shape[1]] = modality.normalise(value[None])[0]
    variable = bool((lengths < extent).any())
    return MemorySet(
        spec=SampleSpec(len(mean), (extent,), variable=variable),
        num_classes=len(class_names),
        class_names=list(class_names),
        modality=modality,
        broken=broken or {},
        samples=samples,
        labels=torch.tensor([recordings[owner].label for owner in owners]),
        lengths=lengths if variable else None,
        test=test,
    )
