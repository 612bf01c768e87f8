"""Clips of coloured bodies that collide, simulated and drawn by pybullet: the kind of film that CLEVRER holds."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from ...errors import DataError
from ..config.data import DataConfig
from ..console import console
from ..extras import optional_module
from ..files import save_arrays
from ..modality.video import Video
from .memory import MemorySet, check_fits, memory_set
from .npz import read_arrays
from .pixels import to_channels

NAME = "bodies"
EXTRA = "layersync_kernels[bodies]"
"""What brings pybullet."""
CLIPS, FPS, SIZE = 2000, 8.0, (32, 32)
CLASSES = tuple(f"{number} {shape}" for number in (1, 2, 3) for shape in ("spheres", "boxes"))
COLOURS = (
    (0.85, 0.15, 0.15),
    (0.15, 0.65, 0.2),
    (0.15, 0.3, 0.9),
    (0.95, 0.8, 0.1),
    (0.6, 0.2, 0.75),
    (0.1, 0.75, 0.8),
)
FLOOR = (0.75, 0.75, 0.75, 1)
RADIUS = 0.45
"""Of a sphere; boxes are as heavy, and a little smaller."""
APART = 1.3
"""From the middle, where bodies start."""
STEPS = 240
"""Of the simulation in a second."""
LESS = ", or take fewer --made-clips"


def load_bodies(config: DataConfig) -> MemorySet:
    """One to three bodies that roll or slide to where they meet; classes by number and shape, colours all different.

    Made once, and kept as an .npz file under `config.data_root`, whose name says what is in it. The same settings give
    the same clips with the same pybullet.

    Raises:
        DataError: clips beyond the memory limit, or a damaged file; names it.
        ConfigError: they have to be made, and pybullet is not installed.
    """
    video = config.video
    (height, width), count, fps = video.video_size or SIZE, video.made_clips or CLIPS, video.video_fps or FPS
    shape = (count, video.frames, height, width, 3)
    check_fits(f"{count} clips of {video.frames}x{height}x{width}", math.prod(shape), config, instead=LESS)
    step = video.frame_stride / fps
    path = config.data_root / f"bodies-{count}x{video.frames}x{height}x{width}-{step:.4g}s.npz"
    if not path.is_file():
        _make(path, shape, step)
    arrays = read_arrays(path, lambda _: ("videos", "labels"), config)
    if (arrays["videos"].shape, arrays["videos"].dtype) != (shape, np.dtype(np.uint8)):
        raise DataError(f"{path} holds {arrays['videos'].dtype} {arrays['videos'].shape}, not uint8 {shape}; delete it")
    clips = to_channels(torch.from_numpy(arrays["videos"]).permute(0, 4, 1, 2, 3), config.channels or 3)
    data = memory_set(clips.contiguous(), arrays["labels"], config, class_names=list(CLASSES))
    return dataclasses.replace(data, modality=Video(fps=1 / step, container=video.video_format))


def _make(path: Path, shape: tuple[int, ...], step: float) -> None:
    bullet = optional_module("pybullet", f"making the clips of --data {NAME}", EXTRA)
    videos, labels = np.empty(shape, np.uint8), np.arange(shape[0]) % len(CLASSES)
    engine = bullet.connect(bullet.DIRECT)
    try:
        for clip in track(range(shape[0]), f"making {path.name}", console=console, transient=True):
            number, box = 1 + int(labels[clip]) // 2, bool(labels[clip] % 2)
            videos[clip] = _film(bullet, engine, np.random.default_rng((0, clip)), number, box, shape[1:4], step)
    finally:
        bullet.disconnect(engine)
    save_arrays(path, {"videos": videos, "labels": labels}, compressed=True)


def _film(
    bullet: Any,
    engine: int,
    generator: np.random.Generator,
    number: int,
    box: bool,
    shape: tuple[int, ...],
    step: float,
) -> np.ndarray:
    """One clip, uint8 (T, H, W, 3)."""
    frames, height, width = shape
    bullet.resetSimulation(physicsClientId=engine)
    bullet.setGravity(0, 0, -9.8, physicsClientId=engine)
    bullet.setTimeStep(1 / STEPS, physicsClientId=engine)
    half = [0.85 * RADIUS] * 3
    ground = bullet.createMultiBody(
        0,
        bullet.createCollisionShape(bullet.GEOM_PLANE, physicsClientId=engine),
        bullet.createVisualShape(bullet.GEOM_BOX, halfExtents=[9, 9, 0.01], rgbaColor=FLOOR, physicsClientId=engine),
        physicsClientId=engine,
    )
    solid, drawn = (
        {"shapeType": bullet.GEOM_BOX, "halfExtents": half}
        if box
        else {"shapeType": bullet.GEOM_SPHERE, "radius": RADIUS},
    ) * 2
    first = generator.uniform(0, 2 * np.pi)
    colours = generator.permutation(len(COLOURS))[:number]
    speed = APART / (0.45 * frames * step)  # they meet before the middle of the clip
    for body in range(number):
        angle = first + 2 * np.pi * body / number + generator.uniform(-0.3, 0.3)
        place = APART * generator.uniform(0.8, 1.1) * np.array([np.cos(angle), np.sin(angle)])
        aim = generator.uniform(-0.25, 0.25, 2) - place
        velocity = speed * generator.uniform(0.8, 1.2) * aim / np.linalg.norm(aim)
        turn = bullet.getQuaternionFromEuler([0, 0, generator.uniform(0, np.pi)])
        rgba = [*COLOURS[colours[body]], 1]
        made = bullet.createMultiBody(
            1.0,
            bullet.createCollisionShape(**solid, physicsClientId=engine),
            bullet.createVisualShape(**drawn, rgbaColor=rgba, physicsClientId=engine),
            [*place, half[2] if box else RADIUS],
            turn,
            physicsClientId=engine,
        )
        bullet.changeDynamics(made, -1, restitution=0.9, lateralFriction=0.05, physicsClientId=engine)
        bullet.resetBaseVelocity(made, [*velocity, 0], physicsClientId=engine)
    bullet.changeDynamics(ground, -1, restitution=0.1, lateralFriction=0.3, physicsClientId=engine)
    view = bullet.computeViewMatrix([0, -2.8, 4.6], [0, -0.1, 0], [0, 0, 1])
    lens = bullet.computeProjectionMatrixFOV(40, width / height, 0.1, 20)
    film = np.empty((*shape, 3), np.uint8)
    for frame in range(frames):
        _, _, pixels, _, _ = bullet.getCameraImage(
            2 * width,
            2 * height,
            view,
            lens,
            lightDirection=[1, -2, 4],
            shadow=0,
            renderer=bullet.ER_TINY_RENDERER,
            flags=bullet.ER_NO_SEGMENTATION_MASK,
            physicsClientId=engine,
        )
        large = np.asarray(pixels, np.uint8).reshape(height, 2, width, 2, 4)[..., :3]
        film[frame] = np.rint(large.mean((1, 3)))
        for _ in range(max(1, round(step * STEPS))):
            bullet.stepSimulation(physicsClientId=engine)
    return film
