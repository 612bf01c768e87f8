"""Films in arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from ...errors import DataError
from ..config.data import DataConfig
from ..modality.video import Video
from .memory import MemorySet, check_fits, memory_set
from .pixels import resize_pixels, to_channels, to_uint8

VIDEO_KEY = "videos"
FPS = 8.0
"""Of films whose rate nobody has said."""


def is_videos(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether the first of the arrays of a file holds films: by its name, or its five dimensions."""
    name, array = next(iter(arrays.items()))
    return name == VIDEO_KEY or array.ndim == 5


def from_videos(videos: np.ndarray, labels: np.ndarray | None, config: DataConfig) -> MemorySet:
    """Films in an array to a MemorySet.

    Args:
        videos: (N, T, H, W) or (N, T, H, W, C), C being 1 or 3; uint8, or floats in [-1, 1] or [0, 1]. Of longer ones
            the middle is taken. They count as of `config.video.video_fps` frames a second, or of 8.
        labels: integers (N,), or None for one class.
        config: channels, frames and size wanted.

    Raises:
        DataError: another shape, type or range; too few frames; samples beyond the memory limit.
    """
    video, shape = config.video, videos.shape
    if not (len(shape) == 4 or (len(shape) == 5 and shape[-1] in (1, 3))) or 0 in shape:
        raise DataError(f"films have shape {shape}; expected (N, T, H, W) or (N, T, H, W, C), C being 1 or 3, N > 0")
    span = (video.frames - 1) * video.frame_stride + 1
    if shape[1] < span:
        raise DataError(
            f"films have {shape[1]} frames; --frames {video.frames} --frame-stride {video.frame_stride} takes {span}"
        )
    size, channels = video.video_size or shape[2:4], config.channels or (1 if len(shape) == 4 else shape[-1])
    what = f"{shape[0]} clips of {channels}x{video.frames}x{size[0]}x{size[1]}"
    check_fits(what, shape[0] * channels * video.frames * size[0] * size[1], config, instead="")
    first = (shape[1] - span) // 2
    chosen = torch.from_numpy(to_uint8(videos)[:, first : first + span : video.frame_stride])
    frames = chosen.flatten(0, 1)[:, None] if chosen.ndim == 4 else chosen.flatten(0, 1).permute(0, 3, 1, 2)
    frames = resize_pixels(to_channels(frames, channels), (size[0], size[1]))
    clips = frames.unflatten(0, chosen.shape[:2]).transpose(1, 2).contiguous()
    modality = Video(fps=(video.video_fps or FPS) / video.frame_stride, container=video.video_format)
    return dataclasses.replace(memory_set(clips, labels, config), modality=modality)
