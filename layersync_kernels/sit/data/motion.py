"""Recordings of human motion as samples: windows, the split by recordings, normalisation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import DataError
from ..config.data import DataConfig
from ..modality.motion import Motion
from ..spec import SampleSpec
from .captions import with_captions
from .memory import MemorySet, check_fits

logger = logging.getLogger(__name__)

IN_MEMORY = ", or take a shorter --motion-frames or a longer --motion-stride"


@dataclass(frozen=True)
class Caption:
    """A sentence about a recording, or about a part of it, in seconds; `end` None: to the end."""

    text: str
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True)
class Recording:
    """A recording.

    Attributes:
        name: for messages.
        values: float32 (F, T), as `Motion` has them.
        label: its class.
        test: whether it belongs to a published test split; None where there is none.
        captions: what is said of it.
    """

    name: str
    values: Tensor
    label: int = 0
    test: bool | None = None
    captions: tuple[Caption, ...] = field(default=())


def check_values(values: Tensor) -> None:
    """Raises ValueError for a recording (F, T) of no frames, or with NaN or infinity in it."""
    if not values.shape[1]:
        raise ValueError("it has no frames; expected at least 1")
    finite = values.isfinite().all(0)
    if not finite.all():
        raise ValueError(f"frame {int(finite.logical_not().nonzero()[0])} is not finite (NaN or infinity)")


def common_skeleton(skeletons: Mapping[str, Motion]) -> Motion:
    """The one that all files, by name, are of; their bodies may be of different size.

    Raises:
        DataError: two differ in their joints, frames a second or kind; names both.
    """
    (first, one), *others = skeletons.items()
    for name, other in others:
        if _described(other) != _described(one):
            raise DataError(
                f"{name} is of another skeleton than {first}: {_described(other)}, not {_described(one)}; keep "
                "the files of each skeleton in a folder of their own"
            )
    return one


def _described(skeleton: Motion) -> str:
    parents = f", parents {skeleton.parents}" if skeleton.parents else ""
    return f"{skeleton.joints} joints as {skeleton.representation} at {skeleton.fps:g} frames a second{parents}"


def motion_set(
    recordings: Sequence[Recording],
    skeleton: Motion,
    config: DataConfig,
    *,
    class_names: Sequence[str],
    broken: dict[str, str] | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> MemorySet:
    """Cuts recordings into samples, and fits the modality to those of the training split.

    Without a published split a tenth of the recordings is for tests: windows of one recording overlap.

    Args:
        recordings: at least one, checked.
        skeleton: what their values are, and how many frames a second.
        config: the windows, the encoder of captions, the memory limit.
        class_names: one a class.
        broken: what could not be read, by name.
        statistics: mean and std of all features, where they are published.

    Raises:
        DataError: more than the memory limit, or captions that are asked for and missing.
    """
    fps = min(config.motion.motion_fps or skeleton.fps, skeleton.fps)
    ratio, frames = skeleton.fps / fps, config.motion.motion_frames
    pieces: list[Tensor] = []
    owners: list[int] = []
    captions: list[str] = []
    for number, recording in enumerate(recordings):
        values = recording.values
        count = max(1, int((values.shape[1] - 1) / ratio + 1e-6) + 1)
        values = values[:, (torch.arange(count) * ratio).round().long()]
        for part, caption in _parts(recording, values, fps, config):
            for start, stop in _windows(part.shape[1], frames, config.motion.motion_stride or max(1, frames // 2)):
                pieces.append(part[:, start:stop])
                owners.append(number)
                captions.append(caption)
    test = _held_out(recordings)[owners]
    training = [piece for piece, held in zip(pieces, test.tolist(), strict=True) if not held] or pieces
    modality = dataclasses.replace(skeleton, fps=fps).fitted(training, statistics)
    extent = min(frames, max(piece.shape[1] for piece in pieces))
    shape = (len(modality.kept), extent)
    check_fits(f"{len(pieces)} samples of {shape}", 4 * len(pieces) * shape[0] * shape[1], config, instead=IN_MEMORY)
    samples = torch.zeros(len(pieces), *shape)
    for sample, piece in zip(samples, pieces, strict=True):
        sample[:, : piece.shape[1]] = modality.normalise(piece[None])[0]
    labels = torch.tensor([recordings[owner].label for owner in owners])
    logger.info("%d recordings, %d samples of %d frames at %g a second", len(recordings), len(pieces), extent, fps)
    data = MemorySet(
        spec=SampleSpec(*shape[:1], shape[1:], variable=True),
        num_classes=len(class_names),
        class_names=list(class_names),
        modality=modality,
        broken=broken or {},
        samples=samples,
        labels=labels,
        lengths=torch.tensor([piece.shape[1] for piece in pieces]),
        test=test,
    )
    return with_captions(data, captions, config)


def _parts(recording: Recording, values: Tensor, fps: float, config: DataConfig) -> list[tuple[Tensor, str]]:
    """What of a recording (F, T) becomes samples: all of it, or what each caption is about."""
    if config.text_encoder is None:
        return [(values, "")]
    if not recording.captions:
        raise DataError(
            f"{recording.name} has no caption, and --text-encoder {config.text_encoder} needs one for each recording; "
            "add it, leave the recording out, or train without --text-encoder"
        )
    parts = []
    for caption in recording.captions:
        stop = None if caption.end is None else max(1, round(caption.end * fps))
        part = values[:, min(int(caption.start * fps), values.shape[1] - 1) : stop]
        parts.append((part if part.shape[1] else values, caption.text))
    return parts


def _windows(length: int, frames: int, stride: int) -> list[tuple[int, int]]:
    """Where the windows of a recording begin and end; the last may be shorter, so that every frame is in one."""
    starts = list(range(0, max(length - frames, 0) + 1, stride))
    if starts[-1] + frames < length:
        starts.append(starts[-1] + stride)
    return [(start, min(start + frames, length)) for start in starts if start < length]


def _held_out(recordings: Sequence[Recording]) -> Tensor:
    """Bool (N,), the recordings for tests."""
    if any(recording.test is not None for recording in recordings):
        return torch.tensor([bool(recording.test) for recording in recordings])
    order = torch.randperm(len(recordings), generator=torch.Generator().manual_seed(0))
    held = torch.zeros(len(recordings), dtype=torch.bool)
    held[order[: len(recordings) // 10]] = True
    return held
