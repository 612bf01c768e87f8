"""Samples as arrays, as `Modality.arrays` gives them: of files, of data sets, and checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, DataError
from ..config.data import DataConfig
from ..data.base import SampleSet
from ..data.memory import check_labels, naming
from ..data.npz import read_arrays
from ..files import save_arrays
from ..modality.base import Modality
from ..modality.latents import Latents
from .validation import take

Arrays = Mapping[str, np.ndarray]
"""By name, with samples first; those without a dimension belong to all samples."""
NAMES = {"images": "arr_0", "video": "videos", "audio": "waveforms", "motion": "positions"}
"""Of the samples themselves, by kind."""
_ELSEWHERE = "decode samples elsewhere and give them by --samples-from, with --data of real ones"
LEAST = 20
"""Samples below which nothing is measured."""


def kind_of(modality: Modality) -> str:
    """images, audio, motion or video: what samples are to those who look at them."""
    name = modality.of if isinstance(modality, Latents) else modality.kind
    return {"mel": "audio", "waveform": "audio"}.get(name, name)


def joined(parts: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """Arrays one after the other, those of shorter sounds padded with zeros; a scalar is that of the first."""
    found = {}
    for name, first in parts[0].items():
        own = [part[name] for part in parts]
        if first.ndim == 0 or name in ("fps", "parents"):
            found[name] = first
            continue
        if first.ndim > 1:
            length = max(array.shape[1] for array in own)
            own = [np.pad(a, [(0, 0), (0, length - a.shape[1]), *[(0, 0)] * (a.ndim - 2)]) for a in own]
        found[name] = np.concatenate(own)
    return {name: own for name, own in found.items() if name != "parents"}


def as_arrays(
    modality: Modality, samples: Tensor, lengths: Tensor | None, source: str, *, otherwise: str = _ELSEWHERE
) -> dict[str, np.ndarray]:
    """Samples (N, C, ...) as networks take them: those of an autoencoder decoded.

    Raises:
        DataError: latents without an autoencoder here; `source` says of what, `otherwise` what can be done then.
    """
    if isinstance(modality, Latents):
        decoded = modality.decoded(samples)
        if decoded is None:
            raise DataError(
                f"{source} holds latents, and no network looks at those; their autoencoder, "
                f"{modality.autoencoder or 'whose name is not known'}, is no folder here: fetch it, or {otherwise}"
            )
        modality, values = decoded
        if lengths is not None:
            lengths = (lengths.cpu() * values.shape[2] / samples.shape[2]).round().long()
        samples = values
    return modality.arrays(samples, lengths)


def some(data: SampleSet, count: int, source: str) -> tuple[dict[str, np.ndarray], Tensor]:
    """The first samples of the shuffled stream of seed 0, and their labels."""
    chunks = list(take(data, count))
    parts = [as_arrays(data.modality, batch.samples.cpu(), batch.condition.lengths, source) for batch in chunks]
    return joined(parts), torch.cat([batch.labels.cpu() for batch in chunks])


def read_samples(
    path: Path, kind: str, modality: Modality, config: DataConfig
) -> tuple[dict[str, np.ndarray], Tensor | None]:
    """Samples of a file, and their classes, where it has any."""
    wanted = "samples" if isinstance(modality, Latents) else NAMES[kind]

    def choose(names: Collection[str]) -> list[str]:
        key = NAMES[kind] if NAMES[kind] in names else wanted
        if key not in names:
            raise DataError(f"holds {sorted(names)}; expected samples of {kind} under '{NAMES[kind]}'")
        beside = ("lengths", "sample_rate", "fps", "arr_1", "labels")
        return [key, *(name for name in beside if name in names)]

    arrays = read_arrays(path, choose, config)
    with naming(path):
        found = arrays.pop("arr_1", arrays.pop("labels", None))
        count = len(next(iter(arrays.values())))
        labels = None if found is None else check_labels(found, count)
        if "samples" in arrays:  # latents, restored
            lengths = torch.from_numpy(arrays["lengths"]) if "lengths" in arrays else None
            values = modality.normalise(torch.from_numpy(arrays["samples"]).float())
            return as_arrays(modality, values, lengths, str(path)), labels
        if kind in ("audio", "motion") and "lengths" not in arrays:
            arrays["lengths"] = np.full(count, next(iter(arrays.values())).shape[1])
    return arrays, labels


def check_samples(arrays: Arrays, real: Arrays, kind: str, where: str) -> None:
    """Raises DataError for samples of another shape, type or range than the real ones; says `where` they are from."""
    key = NAMES[kind]
    given, like = arrays[key], real[key]
    start = 2 if kind in ("audio", "motion") else 1  # sounds and motions have lengths of their own
    if given.ndim != like.ndim or given.shape[start:] != like.shape[start:]:
        raise DataError(
            f"{where} gives '{key}' {given.shape}, the real samples are {like.shape[1:]} each; give samples of that "
            "size, or other --data or --image-size"
        )
    if len(given) < LEAST:
        raise DataError(f"{where} gives {len(given)} samples; expected at least {LEAST}")
    if like.dtype == np.uint8:
        if given.dtype != np.uint8:
            raise DataError(f"{where} gives '{key}' as {given.dtype}; expected uint8, 0 to 255")
        if given.max() <= 1 < like.max():
            raise DataError(f"{where} gives '{key}' from {given.min()} to {given.max()}; expected pixels, 0 to 255")
    elif not np.isfinite(given).all():
        raise DataError(f"{where} gives '{key}' with NaN or infinity in it")
    if kind == "audio":
        rate, wanted = (int(own.get("sample_rate", np.array(0))) for own in (arrays, real))
        if rate != wanted:
            raise DataError(
                f"{where} gives sounds at 'sample_rate' {rate or '(missing)'}, the real ones have {wanted}; "
                "give equal ones"
            )
    lengths = arrays.get("lengths")
    if lengths is not None and not (
        lengths.shape == (len(given),) and 1 <= lengths.min() <= lengths.max() <= given.shape[1]
    ):
        raise DataError(
            f"{where} gives lengths {lengths.shape} from {lengths.min()} to {lengths.max()} for '{key}' {given.shape}"
        )


def write_samples(path: Path, arrays: Arrays, labels: Tensor | None) -> None:
    """Writes samples into one .npz, labels beside them.

    Raises:
        ConfigError: it cannot be written.
    """
    known = {} if labels is None else {"arr_1" if "arr_0" in arrays else "labels": labels.numpy()}
    try:
        save_arrays(path, {**arrays, **known})
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
