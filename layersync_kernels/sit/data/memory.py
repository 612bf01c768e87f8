"""Samples that are all in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..batch import Batch, Condition
from ..config.data import DataConfig
from ..modality.images import Images, pixels_to_unit
from ..modality.latents import Latents
from ..spec import SampleSpec
from .base import SampleSet
from .pixels import chunk_length

INTEGERS = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}
STREAMED = ", or give images in a folder, which are read as training goes"
MAX_EMPTY_CLASSES = 100_000
"""Labels may go up to this where there are fewer samples."""


def limit_bytes(config: DataConfig) -> float:
    """`config.memory_limit_gb` in bytes."""
    return config.memory_limit_gb * 2**30


def check_fits(what: str, size: int, config: DataConfig, *, instead: str = STREAMED) -> None:
    """Stops before memory is allocated that a file asks for.

    Counted are the arrays of a file as they are stored, uncompressed, and the samples that are made of them, each for
    itself: while the ones are made of the others, both are there.

    Args:
        what: what declares the size, for the message.
        size: in bytes.
        config: its `memory_limit_gb` is the limit.
        instead: what can be done other than raising the limit, for the message.

    Raises:
        DataError: more than the limit.
    """
    if not size <= limit_bytes(config):
        gigabytes = size / 2**30
        raise DataError(
            f"{what}: {gigabytes:.3g} GB in memory, more than --memory-limit-gb {config.memory_limit_gb:g}; raise it "
            f"to {math.ceil(gigabytes)} if the machine has as much{instead}"
        )


TYPICAL = 8
"""How many typical lengths there are of each class."""
_CONDITION = tuple(f.name for f in dataclasses.fields(Condition))


@dataclass(kw_only=True)
class MemorySet(SampleSet):
    """All samples in one tensor, on the training device when it fits there: a batch is one gather.

    uint8 samples are pixels 0..255 and become [-1, 1]; floating samples are handed out as they are, times `scale`.

    Attributes:
        samples: (N, C, ...); zeros beyond a sample's length.
        labels, lengths, text, text_lengths: of all samples, see `Condition`.
        test: bool (N,), the samples of a published test split; None where there is none.
        scale: factor on floating samples.
    """

    samples: Tensor
    labels: Tensor
    lengths: Tensor | None = None
    text: Tensor | None = None
    text_lengths: Tensor | None = None
    test: Tensor | None = None
    scale: float = 1.0

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device) -> MemorySet:
        """Moves the samples to `device`, unless they would take more than a quarter of its free memory."""
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self.samples.nbytes > free // 4:
                self._move(Tensor.pin_memory)
                return self
        self._move(lambda tensor: tensor.to(device))
        return self

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        for name in ("samples", *_CONDITION):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, move(tensor))

    def subset(self, index: Tensor) -> MemorySet:
        """The samples of these numbers, of the same classes."""
        index = index.to(self.samples.device)
        parts = {name: getattr(self, name) for name in ("samples", *_CONDITION)}
        chosen: dict[str, Any] = {name: None if tensor is None else tensor[index] for name, tensor in parts.items()}
        return dataclasses.replace(self, **chosen, test=None if self.test is None else self.test[index.cpu()])

    @property
    def text_width(self) -> int | None:
        """See `SampleSet.text_width`."""
        return None if self.text is None else self.text.shape[2]

    def typical_lengths(self) -> tuple[tuple[int, ...], ...]:
        """See `SampleSet.typical_lengths`: quantiles."""
        if self.lengths is None:
            return ()
        typical: list[tuple[int, ...]] = []
        for label in range(self.num_classes):
            own = self.lengths[self.labels == label].sort().values.tolist()
            typical.append(tuple(own[(2 * i + 1) * len(own) // (2 * TYPICAL)] for i in range(TYPICAL)) if own else ())
        return tuple(typical)

    def take(self, index: Tensor) -> Batch:
        """See `SampleSet.take`; on the device of the samples, but for the index."""
        there = index
        if self.samples.is_cuda:  # from memory that is not pinned, a copy waits for all that the card has to do
            there = index.pin_memory().to(self.samples.device, non_blocking=True)
        samples = self.samples[there]
        values = pixels_to_unit(samples) if samples.dtype == torch.uint8 else samples.float() * self.scale
        condition: dict[str, Any] = {
            name: None if (t := getattr(self, name)) is None else t[there] for name in _CONDITION
        }
        return Batch(values, Condition(**condition), index)


def memory_set(
    samples: Tensor,
    labels: np.ndarray | Tensor | None,
    config: DataConfig,
    *,
    class_names: list[str] | None = None,
    latent: bool = False,
    broken: dict[str, str] | None = None,
) -> MemorySet:
    """A set of checked samples and labels, uint8 pixels or floating latents (N, C, H, W)."""
    checked = check_labels(labels, len(samples))
    num_classes = len(class_names) if class_names else int(checked.max()) + 1
    if num_classes > max(len(samples), MAX_EMPTY_CLASSES):  # the model has weights for each
        raise DataError(f"labels go up to {num_classes - 1}, of {len(samples)} samples; number the classes from 0 on")
    scale = config.latent_scale if latent else 1.0
    if latent and (bad := first_not_finite(samples, scale)) is not None:
        raise DataError(
            f"the latents of sample {bad} are not finite{'' if scale == 1 else f' times --latent-scale {scale:g}'}; "
            "compute them anew, or leave that sample out"
        )
    return MemorySet(
        spec=SampleSpec.of(samples.shape[1:]),
        num_classes=num_classes,
        class_names=class_names or [str(c) for c in range(num_classes)],
        modality=Latents() if latent else Images(),
        broken=broken or {},
        samples=samples,
        labels=checked,
        scale=scale,
    )


def check_labels(labels: np.ndarray | Tensor | None, count: int) -> Tensor:
    """Labels as int64 (count,), zeros where there are none; raises DataError for anything but integers from 0 on."""
    if labels is None:
        return torch.zeros(count, dtype=torch.long)
    try:
        tensor = torch.as_tensor(labels)
    except TypeError as error:
        raise DataError(f"labels are {labels.dtype}; expected integers") from error
    if tensor.shape != (count,):
        raise DataError(f"labels have shape {tuple(tensor.shape)}; expected ({count},), one per sample")
    if tensor.dtype not in INTEGERS:
        raise DataError(f"labels are {tensor.dtype}; expected integers")
    tensor = tensor.long()
    if int(tensor.min()) < 0:
        raise DataError(f"labels go down to {int(tensor.min())}; expected 0, 1, 2 ...")
    return tensor


def first_not_finite(samples: Tensor, scale: float = 1.0) -> int | None:
    """The number of the first of the samples (N, ...) that holds NaN or infinity as fp32, or None; made in pieces."""
    start = 0
    for part in samples.split(chunk_length(samples.shape)):
        low, high = part.aminmax()  # NaN if there is one; one pass, which allocates nothing
        if not ((low.float() * scale).isfinite() & (high.float() * scale).isfinite()):
            return start + int((part.float() * scale).isfinite().flatten(1).all(1).logical_not().nonzero()[0])
        start += len(part)
    return None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name before a DataError raised inside."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
