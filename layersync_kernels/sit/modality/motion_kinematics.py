"""Skeletons: where joints are, which way a body faces, and the path that it takes. All arrays are float64, y is up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

GROUND = [0, 2]
"""The axes of the ground, x and z."""


def _rotations(vectors: np.ndarray) -> Any:
    """Exponential maps (..., 3) as (N,) rotations of SciPy, which is imported when it is needed."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_rotvec(vectors.reshape(-1, 3))


def from_euler(order: str, degrees: np.ndarray) -> np.ndarray:
    """Exponential maps (T, 3) of turns (T, len(order)) about axes such as "ZXY", each of those that came before."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_euler(order, degrees, degrees=True).as_rotvec()


def forward_kinematics(
    rotations: np.ndarray, root: np.ndarray, parents: Sequence[int], offsets: np.ndarray
) -> np.ndarray:
    """Joint positions of a skeleton: x_j = x_p + R_p·offset_j, R_j = R_p·exp(r_j).

    Args:
        rotations: (..., J, 3), of each joint within its parent's frame, as exponential maps in radians.
        root: (..., 3), position of joint 0.
        parents: J numbers, each lower than the joint's own; -1 for joint 0.
        offsets: (J, 3), of each joint in its parent's frame.

    Returns:
        (..., J, 3) in the units of offsets and root.
    """
    local = _rotations(rotations).as_matrix().reshape(*rotations.shape, 3)
    turned, places = [local[..., 0, :, :]], [root]
    for joint, parent in enumerate(parents[1:], 1):
        turned.append(turned[parent] @ local[..., joint, :, :])
        places.append(places[parent] + turned[parent] @ offsets[joint])
    return np.stack(places, -2)


def turn(points: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Points (..., 3) turned about the vertical by angles (...), counter-clockwise as seen from above."""
    cos, sin = np.cos(angles), np.sin(angles)
    x, y, z = np.moveaxis(points, -1, 0)
    return np.stack([cos * x + sin * z, y, cos * z - sin * x], -1)


def turn_rotations(rotations: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Exponential maps (..., 3), turned as `turn` turns points; their own angles lie in [0, π]."""
    about_vertical = _rotations(angles[..., None] * [0.0, 1.0, 0.0])
    return (about_vertical * _rotations(rotations)).as_rotvec().reshape(rotations.shape)


def spin(rotations: np.ndarray) -> np.ndarray:
    """Angles (T - 1,) between exponential maps (T, 3) and those of the frame before."""
    turned = _rotations(rotations)
    return (turned[1:] * turned[:-1].inv()).magnitude()


def heading(positions: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Angles (...) about the vertical by which `reference` has to be turned to lie best on the bodies seen from above.

    Args:
        positions: (..., J, 3).
        reference: (J, 2), x and z of a body that faces +z, times the weights of its joints.
    """
    body = _seen_from_above(positions)
    return -np.angle((body * (reference[:, 0] - 1j * reference[:, 1])).sum(-1))


def _seen_from_above(positions: np.ndarray) -> np.ndarray:
    """Joints (..., J) as x + iz about joint 0."""
    ground = positions[..., GROUND] - positions[..., :1, GROUND]
    return ground[..., 0] + 1j * ground[..., 1]


def heading_reference(clips: Sequence[np.ndarray]) -> np.ndarray:
    """What `heading` compares bodies with: their mean, turned so that they move towards +z on the whole.

    Joints count by how little they move about: hips say which way a body faces, hands do not.

    Args:
        clips: positions (T, J, 3) each.

    Returns:
        (J, 2).
    """
    body = np.concatenate([_seen_from_above(clip) for clip in clips])
    mean, weight = body[0], np.ones(body.shape[1])
    for _ in range(8):  # of generalised Procrustes analysis
        aligned = body * np.exp(-1j * np.angle((body * (weight * mean).conj()).sum(-1, keepdims=True)))
        mean = aligned.mean(0)
        spread = np.square(np.abs(aligned - mean)).mean(0)
        weight = 1 / (spread + 1e-3 * spread.mean() + 1e-12)
    mean = weight / weight.max() * mean
    reference = np.stack([mean.real, mean.imag], -1)
    moved = sum(
        (turn(np.diff(clip[:, 0], axis=0), -heading(clip, reference)[1:]).sum(0) for clip in clips), np.zeros(3)
    )
    mean = mean * np.exp(1j * (np.pi / 2 - np.angle(moved[0] + 1j * moved[2])))
    return np.stack([mean.real, mean.imag], -1)


def path_steps(root: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The way of joint 0 as seen from itself, which `follow_path` undoes.

    Args:
        root: (..., T, 3), its positions.
        angles: (..., T), which way the body faces.

    Returns:
        (..., T, 4): turn since the frame before, and step to the right, height, and step ahead. The first frame, of
        which neither is known, has those of the second.
    """
    turns = (np.diff(angles, axis=-1) + np.pi) % (2 * np.pi) - np.pi
    steps = turn(np.diff(root, axis=-2), -angles[..., 1:])
    known = np.concatenate([turns[..., None], steps], -1)
    first = known[..., :1, :] if known.shape[-2] else np.zeros((*root.shape[:-2], 1, 4))
    path = np.concatenate([first, known], -2)
    path[..., 2] = root[..., 1]
    return path


def follow_path(path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (..., T, 3) and angles (..., T) of what `path_steps` gives, from above the origin and facing +z."""
    turns, steps = path[..., 0].copy(), path[..., 1:].copy()
    turns[..., 0], steps[..., 0, :] = 0, 0
    angles = turns.cumsum(-1)
    root = turn(steps, angles).cumsum(-2)
    root[..., 1] = path[..., 2]
    return root, angles
