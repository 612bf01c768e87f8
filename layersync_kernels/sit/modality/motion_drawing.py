"""Stick figures: a grid of films as one GIF, and moments of them in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .motion_kinematics import turn
from .pictures import save_animation, save_picture

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
GROUND: Colour = (190, 190, 190)
LIMBS: tuple[Colour, ...] = ((200, 60, 40), (40, 90, 190), (40, 40, 40))
"""Of the branches that begin at joint 0, in turn: of most skeletons the legs and what is above."""
CELL = 120
"""Side of a figure's frame in pixels."""
VIEW = np.array(np.pi / 3)
"""The camera stands to the left of where the body faces at first, a little before it."""
MOMENTS = 6
"""Frames of a film in a picture."""
STANDING = 0.72
"""Height of a body in its cell."""


class _Stage:
    """Where a film is seen from: all of it at one scale, on one ground, the camera moving along.

    Args:
        places: (T, J, 3), T at least 1.
        parents: of the joints; empty: joints are dots.
    """

    def __init__(self, places: np.ndarray, parents: Sequence[int]) -> None:
        seen = turn(np.nan_to_num(places.astype(np.float64)), VIEW)
        self.parents = parents
        self.colours = _colours(parents, places.shape[1])
        self.ground = float(np.percentile(seen[..., 1].min(1), 5))
        size = float(np.median(np.ptp(seen, axis=1).max(-1)))
        self.scale = STANDING * CELL / max(size, 1e-6)
        self.size = size
        self.camera = seen[:, 0, 0]
        self.seen = seen

    def draw(self, draw: ImageDraw.ImageDraw, frame: int, left: float, top: float, *, ground: bool = True) -> None:
        """One frame, the body in the middle of a cell whose corner is there."""
        horizon, middle = top + 0.88 * CELL, left + CELL / 2
        if ground:
            draw.line([left, horizon, left + CELL, horizon], fill=GROUND)
            gap = max(self.size / 4, 1e-6)  # marks on the ground: without them nobody sees how fast the camera goes
            half = CELL / 2 / self.scale
            first = np.ceil((self.camera[frame] - half) / gap) * gap
            for mark in np.arange(first, self.camera[frame] + half, gap):
                x = middle + (mark - self.camera[frame]) * self.scale
                draw.line([x, horizon, x - 3, horizon + 5], fill=GROUND)
        x = middle + (self.seen[frame, :, 0] - self.camera[frame]) * self.scale
        y = horizon - (self.seen[frame, :, 1] - self.ground) * self.scale
        points = np.clip(np.stack([x, y], -1), [left, top], [left + CELL - 1, top + CELL - 1]).round().astype(int)
        for joint, (place, colour) in enumerate(zip(points.tolist(), self.colours, strict=True)):
            if self.parents and joint:
                draw.line([*points[self.parents[joint]].tolist(), *place], fill=colour, width=2)
            elif not self.parents:
                draw.ellipse([place[0] - 1, place[1] - 1, place[0] + 1, place[1] + 1], fill=colour)


def _colours(parents: Sequence[int], joints: int) -> list[Colour]:
    if not parents:
        return [LIMBS[-1]] * joints
    branches = [joint for joint, parent in enumerate(parents) if parent == 0]
    colours = [LIMBS[-1]] * joints
    for joint in range(1, joints):
        parent = parents[joint]
        colours[joint] = LIMBS[min(branches.index(joint), len(LIMBS) - 1)] if parent == 0 else colours[parent]
    return colours


def save_film(clips: Sequence[np.ndarray], parents: Sequence[int], fps: float, path: Path, *, columns: int) -> Path:
    """Writes films (T, J, 3), row by row, as one animated GIF without end; one that is over stands still.

    Args:
        clips: positions of joints, y up; at least one.
        parents: of the joints; empty: joints are dots.
        fps: frames a second. A GIF counts in hundredths of a second, and above 50 frames are left out.
        path: of the file.
        columns: films in a row.
    """
    stages = [_Stage(clip, parents) for clip in clips]
    skip = max(1, round(fps / 50) if fps > 50 else 1)
    columns = min(columns, len(stages))
    size = columns * CELL, -(-len(stages) // columns) * CELL
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for colour in (PAPER, GROUND, *LIMBS) for value in colour])
    frames = []
    for frame in range(0, max(map(len, clips)), skip):
        picture = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(picture)
        for number, stage in enumerate(stages):
            now = min(frame, len(stage.seen) - 1)
            stage.draw(draw, now, number % columns * CELL, number // columns * CELL)
        frames.append(picture.quantize(palette=palette, dither=Image.Dither.NONE))
    return save_animation(frames, fps / skip, path)


def save_strips(clips: Sequence[np.ndarray], parents: Sequence[int], path: Path, *, columns: int) -> Path:
    """Writes moments of films (T, J, 3), from left to right, as one PNG of a row for each film, or of few beside each
    other.

    Args:
        clips: positions of joints, y up; at least one.
        parents: of the joints; empty: joints are dots.
        path: of the file.
        columns: films in a row.
    """
    columns = min(columns, len(clips))
    width = CELL // 2 * (MOMENTS + 1)
    picture = Image.new("RGB", (columns * width, -(-len(clips) // columns) * CELL), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, clip in enumerate(clips):
        stage = _Stage(clip, parents)
        left, top = number % columns * width, number // columns * CELL
        for moment, frame in enumerate(np.linspace(0, len(clip) - 1, MOMENTS).round().astype(int)):
            stage.draw(draw, int(frame), left + moment * (CELL // 2), top)
    return save_picture(picture, path)
