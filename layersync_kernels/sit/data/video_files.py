"""Clips from files, by PyAV."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.data import DataConfig
from ..extras import optional_module
from ..modality.base import check_fps
from ..modality.video import EXTRA
from .memory import limit_bytes
from .pixels import resize_pixels

DEMUXERS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".avi": "avi",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".gif": "gif",
}
"""By suffix. The suffix decides: a list of addresses that calls itself .mp4 would otherwise be followed."""
MAX_PIXELS = 2**27
"""Of a frame, where nothing else limits it: 16K."""
SEEK = 1.0
"""Seconds from the start before which a film is read from its start."""


@dataclass(frozen=True)
class Film:
    """A file, as its headers describe it.

    Attributes:
        path: of the file.
        label: its class.
        frames: how many there are.
        fps: of them a second, on average.
        size: height and width.
    """

    path: Path
    label: int
    frames: int
    fps: float
    size: tuple[int, int]


@dataclass(frozen=True)
class Clip:
    """A part of a film: its frames begin at `start`, in seconds, and are `step` seconds apart."""

    film: Film
    start: float
    step: float


def probe(path: Path, label: int, config: DataConfig) -> Film:
    """Reads the headers of a file, and counts its frames where they do not say.

    Raises:
        ValueError: it has no video, no rate, or frames beyond the memory limit.
        Exception: it is damaged.
    """
    with _open(path) as container:
        stream = _stream(container, config)
        fps = check_fps(float(stream.average_rate or stream.guessed_rate or 0), declared=True)
        size = (stream.codec_context.height, stream.codec_context.width)
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        return Film(path, label, frames, fps, size)


def clips_of(film: Film, config: DataConfig) -> list[Clip]:
    """The clips of a film, as `config.video` wants them.

    Raises:
        ValueError: it is shorter than one.
    """
    video = config.video
    step = video.frame_stride / (video.video_fps or film.fps)
    last = (film.frames - 1) / film.fps - (video.frames - 1) * step  # where the last one may start
    if last < -_slack(film):
        raise ValueError(
            f"its {film.frames} frames, {film.fps:g} a second, are too short for {video.frames} frames {step:.3g} s "
            "apart; give a smaller --frames or --frame-stride"
        )
    if video.clips_per_file is None:
        starts = [n * video.frames * step for n in range(1 + int((last + _slack(film)) / (video.frames * step)))]
    elif video.clips_per_file == 1:
        starts = [last / 2]
    else:
        starts = np.linspace(0, max(last, 0), video.clips_per_file).tolist()
    return [Clip(film, max(0, round(start * film.fps)) / film.fps, step) for start in starts]


def read_clips(clips: Sequence[Clip], size: tuple[int, int], config: DataConfig) -> Tensor:
    """Clips of one film from one pass over it: uint8 (N, C, T, H, W).

    A frame is shown until the next one begins, as a player does it. Each is scaled by itself: that a film changes its
    size is no error. A turn that a telephone has noted is not applied.

    Args:
        clips: of one film, in the order of their starts.
        size: H and W.
        config: frames of a clip, channels, and the memory limit.

    Raises:
        ValueError: the film ends before its clips do, or has frames beyond the memory limit.
        Exception: it is damaged.
    """
    film, frames, channels = clips[0].film, config.video.frames, config.channels or 3
    read = torch.empty(len(clips), channels, frames, *size, dtype=torch.uint8)
    moments = [(clip.start + k * clip.step, n, k) for n, clip in enumerate(clips) for k in range(frames)]
    todo = deque(sorted(moments))
    for frame, ends in _frames(film, todo[0][0], config):
        shown: Tensor | None = None
        while todo and todo[0][0] < ends - _slack(film):
            shown = _pixels(frame, channels, size) if shown is None else shown
            _, number, k = todo.popleft()
            read[number, :, k] = shown
        if not todo:
            return read
    raise ValueError(f"it ends before {todo[0][0]:.3g} s, and declares {film.frames / film.fps:.3g} s")


def _frames(film: Film, start: float, config: DataConfig) -> Iterator[tuple[Any, float]]:
    """Frames from one at `start` or before it, and when the next one takes its place; the last one stays 1 / fps."""
    with _open(film.path) as container:
        stream = _stream(container, config)
        origin, base = stream.start_time or 0, float(stream.time_base)
        sought = start > SEEK and film.path.suffix.lower() != ".gif"
        if sought:
            container.seek(origin + int(start / base), stream=stream)  # to a frame that needs no other, before it
        before: tuple[Any, float] | None = None
        for number, frame in enumerate(container.decode(stream)):
            begins = number / film.fps if frame.pts is None else (frame.pts - origin) * base
            if before is None and sought and (frame.pts is None or begins > start + _slack(film)):
                raise ValueError(f"it has no frame at {start:.3g} s that can be found")
            if before is not None:
                yield before[0], begins
            before = frame, begins
        if before is not None:
            yield before[0], before[1] + 1 / film.fps


def _slack(film: Film) -> float:
    """Seconds by which times in files may be rounded."""
    return 0.25 / film.fps


def _pixels(frame: Any, channels: int, size: tuple[int, int]) -> Tensor:
    """A frame as uint8 (C, H, W)."""
    array = frame.to_ndarray(format="gray" if channels == 1 else "rgb24")
    pixels = torch.from_numpy(array.reshape(frame.height, frame.width, channels)).permute(2, 0, 1)
    return resize_pixels(pixels[None], size)[0]


def _open(path: Path) -> Any:
    av = optional_module("av", "reading films", EXTRA)
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise OSError("it is no file")
    # An absolute path: FFmpeg takes "concat:a.mp4" for an order to open others.
    options = [{"max_pixels": str(MAX_PIXELS)}]
    return av.open(str(path.absolute()), format=DEMUXERS[path.suffix.lower()], stream_options=options)


def _stream(container: Any, config: DataConfig) -> Any:
    """The film in a file, to be decoded by one thread and with frames no larger than the memory limit."""
    if not container.streams.video:
        raise ValueError("it has no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    per_pixel = 4 + 5 * (config.channels or 3)  # as decoded; as bytes; as the floats that resizing takes
    most = MAX_PIXELS if config.memory_limit_gb == 0 else min(MAX_PIXELS, int(limit_bytes(config) / per_pixel))
    size = context.width * context.height  # 0: FFmpeg has refused what is beyond MAX_PIXELS
    if not 0 < size <= most:
        raise ValueError(f"it declares no size, or frames beyond --memory-limit-gb and {most} pixels")
    context.options = {"max_pixels": str(most)}
    context.thread_count = 1
    return stream
