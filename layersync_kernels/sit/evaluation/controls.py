"""Real samples and what is made of them, as a network sees them: what generated samples are compared with."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import DataError
from ..data.base import SampleSet
from ..files import atomic_path
from ..teachers.features import fingerprint
from .arrays import LEAST, Arrays, some
from .networks import Network, Seen

logger = logging.getLogger(__name__)

CONTROLS = ("real", "blurred", "noisy")
REPRESENTED = "represented"
MOST = 1000
"""Samples of a control, at most."""
BLUR, NOISE = 1 / 16, 0.1
"""Of images and films: standard deviations, of the blur in shorter sides, of the noise in ranges of values."""
SOUND_BLUR, SOUND_NOISE = 5e-4, 0.3
"""Of sounds: of the blur in seconds, of the noise in root mean squares of the sound."""
MOTION_BLUR, MOTION_NOISE = 3.0, 0.05
"""Of motion: of the blur in frames, of the noise in mean distances of joints from joint 0."""
_FORMAT = 1


def disturbed(arrays: Arrays, how: str) -> dict[str, np.ndarray]:
    """Samples "blurred" or "noisy", see the constants above; the same ones always."""
    generator = np.random.default_rng(0)
    changed = dict(arrays)
    if "waveforms" in arrays:
        rate = float(arrays["sample_rate"])
        changed["waveforms"] = _clips(arrays["waveforms"], arrays, lambda own: _sound(own, how, rate, generator))
    elif "positions" in arrays:
        changed["positions"] = _clips(arrays["positions"], arrays, lambda own: _motion(own, how, generator))
    else:
        name = "videos" if "videos" in arrays else "arr_0"
        changed[name] = np.stack([_pixels(own, how, generator) for own in arrays[name]])
    return changed


def _clips(values: np.ndarray, arrays: Arrays, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Each clip (L, ...) of (N, L, ...) changed, zeros beyond its length."""
    made = np.zeros_like(values)
    for row, own, length in zip(made, values, arrays["lengths"].tolist(), strict=True):
        row[:length] = change(own[:length])
    return made


def _blurred(values: np.ndarray, width: Sequence[float]) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    blurred: np.ndarray = gaussian_filter(values.astype(np.float32), width, mode="nearest")
    return blurred


def _pixels(own: np.ndarray, how: str, generator: np.random.Generator) -> np.ndarray:
    """uint8 (..., H, W, C)."""
    if how == "blurred":
        width = BLUR * min(own.shape[-3:-1])
        values = _blurred(own, [*[0.0] * (own.ndim - 3), width, width, 0.0])
    else:
        values = own + generator.normal(0, NOISE * 255, own.shape)
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _sound(own: np.ndarray, how: str, rate: float, generator: np.random.Generator) -> np.ndarray:
    """float32 (L,)."""
    if how == "blurred":
        return _blurred(own, [SOUND_BLUR * rate])
    return own + generator.normal(0, SOUND_NOISE * float(np.sqrt(np.mean(own**2))) + 1e-9, own.shape)


def _motion(own: np.ndarray, how: str, generator: np.random.Generator) -> np.ndarray:
    """float32 (T, J, 3)."""
    if how == "blurred":
        return _blurred(own, [MOTION_BLUR, 0.0, 0.0])
    size = float(np.linalg.norm(own - own[:, :1], axis=-1).mean())
    return own + generator.normal(0, MOTION_NOISE * size + 1e-9, own.shape)


@dataclass(frozen=True)
class Real:
    """Real samples as a network sees them, and the controls.

    Attributes:
        seen: all of them.
        labels: int64 (N,).
        controls: by name, of the first `len(control)` samples; of "represented" after a run's own representation.
    """

    seen: Seen
    labels: Tensor
    controls: dict[str, Seen]

    @property
    def rest(self) -> Seen:
        """What the controls are compared with: the second half, of which none is in a control."""
        return self.seen[len(self.seen) // 2 :]

    @property
    def rest_labels(self) -> Tensor:
        """Of `rest`."""
        return self.labels[len(self.seen) // 2 :]


def see_real(
    network: Network, data: SampleSet, count: int, folder: Path, *, source: str, represented: SampleSet | None = None
) -> Real:
    """Real samples and their controls as `network` sees them; computed once per data set, and kept in `folder`.

    Args:
        network: any.
        data: real samples.
        count: how many, at most.
        folder: of the cache; where it cannot be written, a warning says so.
        source: what the data are called.
        represented: the same samples as a run's own representation has them, where that loses something.

    Raises:
        DataError: fewer than `LEAST` samples, or latents that cannot be decoded.
        TeacherError: features that are not finite.
    """
    count = min(count, len(data))
    if count < LEAST:
        raise DataError(f"{source} has {count} real samples to compare with; expected at least {LEAST}")
    facts: dict[str, Any] = {"format": _FORMAT, "network": network.identity, "data": fingerprint(data), "count": count}
    if represented is not None:
        facts["represented"] = fingerprint(represented)

    def compute() -> dict[str, Tensor]:
        arrays, labels = some(data, count, source)
        seen = network(arrays, "real")
        half = min(count // 2, MOST)
        part = {key: own[:half] if own.ndim else own for key, own in arrays.items()}
        controls = {how: seen[:half] if how == "real" else network(disturbed(part, how), how) for how in CONTROLS}
        if represented is not None:
            controls[REPRESENTED] = network(some(represented, half, source)[0], REPRESENTED)
        return dict(_tensors(Real(seen, labels, controls)))

    return _real(kept(folder, "real", facts, compute))


def kept(folder: Path, kind: str, facts: dict[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `compute` gives, or gave before for the same facts: kept in a file of `folder` that is named after them."""
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{kind}-{name}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            logger.warning("%s cannot be read, and is computed anew: %s", path, error)
    tensors = compute()
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"facts": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        logger.warning("the features of real samples are not kept: %s; give another --real-cache", error)
    return tensors


def _tensors(real: Real) -> Iterator[tuple[str, Tensor]]:
    yield "labels", real.labels
    for name, seen in {"all": real.seen, **real.controls}.items():
        for key, own in seen.sets.items():
            yield f"{name}/{key}", own.clone()  # a control may be a view of all
        if seen.logits is not None:
            yield f"{name}//logits", seen.logits.clone()


def _real(tensors: dict[str, Tensor]) -> Real:
    labels = tensors.pop("labels")
    found: dict[str, Seen] = {}
    for key, own in tensors.items():
        name, _, which = key.partition("/")
        seen = found.get(name, Seen())
        found[name] = Seen(seen.sets, own) if which == "/logits" else Seen(seen.sets | {which: own}, seen.logits)
    known = (name for name in (*CONTROLS, REPRESENTED) if name in found)  # a file has them in an order of its own
    return Real(found["all"], labels, {name: found[name] for name in known})
