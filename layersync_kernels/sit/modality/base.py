"""What is asked of a modality."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..config.video import MAX_FPS


@dataclass(frozen=True, kw_only=True)
class Modality(ABC):
    """What samples stand for. A subclass is a dataclass of JSON values, and is entered in `registry.MODALITIES`.

    Attributes:
        kind: its name.
        mean: of each channel over the training data, which samples have lost; empty: 0.
        std: standard deviation of each channel, by which they are divided; empty: 1.
    """

    kind: ClassVar[str]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def normalise(self, values: Tensor) -> Tensor:
        """Values of the data (B, C, ...) to samples of the model."""
        return (values - self._per_channel(self.mean, 0.0, values)) / self._per_channel(self.std, 1.0, values)

    def restore(self, samples: Tensor) -> Tensor:
        """Samples of the model (B, C, ...) to values of the data."""
        return samples * self._per_channel(self.std, 1.0, samples) + self._per_channel(self.mean, 0.0, samples)

    @staticmethod
    def _per_channel(values: tuple[float, ...], default: float, like: Tensor) -> Tensor:
        return like.new_tensor(values or (default,)).view(1, -1, *[1] * (like.ndim - 2))

    @abstractmethod
    def overview(self, samples: Tensor, stem: Path, *, columns: int, lengths: Tensor | None = None) -> list[Path]:
        """Writes what shows many samples at once, and whatever else is to be seen or heard of them.

        Args:
            samples: of the model (N, C, ...), row by row.
            stem: of the files' names, with no suffix; its folder may have to be made.
            columns: samples in a row.
            lengths: int64 (N,); None: all are full.

        Returns:
            the files; the first is a picture.
        """

    @abstractmethod
    def save(self, sample: Tensor, stem: Path) -> Path:
        """Writes one sample (C, ...), cut to its length, into a file of the usual kind, and returns where it is."""

    def arrays(self, samples: Tensor, lengths: Tensor | None = None) -> dict[str, np.ndarray]:
        """What an .npz file of samples (N, C, ...) holds: by default the restored values, and lengths if any."""
        arrays = {"samples": self.restore(samples.float().cpu()).numpy()}
        return arrays if lengths is None else arrays | {"lengths": lengths.cpu().numpy()}


def check_fps(fps: float, *, declared: bool = False) -> float:
    """Frames a second, as given.

    Args:
        fps: more than 0, and up to `MAX_FPS`.
        declared: whether a file says so, for the message.

    Raises:
        ValueError: nobody records like that.
    """
    if not 0 < fps <= MAX_FPS:
        if declared:
            raise ValueError(f"it declares {fps:g} frames a second; expected more than 0, and up to {MAX_FPS}")
        raise ValueError(f"fps is {fps:g}; expected a number of frames a second")
    return fps


def cut(samples: Tensor, lengths: Tensor | None) -> Sequence[Tensor]:
    """Each sample (C, ...) of (N, C, ...) with no more of its first extent than its length."""
    if lengths is None:
        return list(samples)
    return [sample[:, :length] for sample, length in zip(samples, lengths.tolist(), strict=True)]


def channel_statistics(values: Sequence[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over tensors (C, ...); 1 for a channel that is constant."""
    count = sum(value[0].numel() for value in values)
    total = torch.stack([value.double().flatten(1).sum(1) for value in values]).sum(0)
    mean = total / count
    squares = torch.stack([(value.double().flatten(1) - mean[:, None]).square().sum(1) for value in values]).sum(0)
    std = (squares / count).sqrt()
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.ones_like(std))
    return tuple(mean.tolist()), tuple(std.tolist())
