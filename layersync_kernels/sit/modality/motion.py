"""Human motion: a vector for each frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..files import add_suffix, save_arrays
from .base import Modality, channel_statistics, check_fps, cut
from .motion_drawing import save_film, save_strips
from .motion_kinematics import (
    follow_path,
    forward_kinematics,
    heading,
    heading_reference,
    path_steps,
    turn,
    turn_rotations,
)

Representation = Literal["positions", "rotations", "humanml3d"]

HUMANML3D_WIDTH = 263
HUMANML3D_PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19)
"""Of the 22 joints of SMPL's body, which HumanML3D's features are of."""
LEAST_SPREAD = 0.1
"""Of joints, as a share of the median: a finger that moves once would be an outlier of many standard deviations."""
PATH = 4
"""Features of the path: turn, step to the right, height, step ahead."""


@dataclass(frozen=True, kw_only=True)
class Motion(Modality):
    """Bodies that move.

    Values are what files hold, `features` what a model can learn: bodies as seen from themselves, which `restore`
    puts back on their path. That begins above the origin, and faces +z. y is up.

    - "positions": the values of a frame are x, y, z of J joints; its features the path, and the other joints as seen
      from joint 0.
    - "rotations": the values are the position of joint 0, and an exponential map for each joint within its parent's
      frame; the features the path, and the exponential maps, the first without the turn.
    - "humanml3d": both are the 263 features of HumanML3D.

    Attributes:
        representation: of the values.
        fps: frames a second.
        parents: of each joint, a lower number; -1 for joint 0; empty where nobody knows.
        offsets: of each joint in its parent's frame; of "rotations" only.
        reference: x and z of each joint of the body that `heading` compares with; not for "humanml3d".
        kept: features that vary, which samples have; `mean` and `std` are of these.
        constant: all features, where they do not vary.
    """

    kind: ClassVar[str] = "motion"
    representation: Representation
    fps: float
    parents: tuple[int, ...] = ()
    offsets: tuple[tuple[float, float, float], ...] = ()
    reference: tuple[tuple[float, float], ...] = ()
    kept: tuple[int, ...] = ()
    constant: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        parents, joints, width = self.parents, self.joints, self.feature_width
        check_fps(self.fps)
        if parents and not (parents[0] == -1 and all(0 <= p < j for j, p in enumerate(parents[1:], 1))):
            raise ValueError(f"parents are {parents}; expected -1, then for each joint a number below its own")
        if self.representation == "rotations" and not (parents and len(self.offsets) == len(parents)):
            raise ValueError(f"{len(self.offsets)} offsets for {len(parents)} parents; expected one for each joint")
        if parents and len(parents) != joints:
            raise ValueError(f"{len(parents)} parents for {joints} joints")
        if self.constant and not (
            len(self.constant) == width and len(self.kept) == len(self.mean) == len(self.std) and self.kept
        ):
            raise ValueError(f"{len(self.kept)} features of {width} are kept, with {len(self.mean)} means")
        if any(not 0 <= feature < width for feature in self.kept):
            raise ValueError(f"features {self.kept} are kept, of {width}")

    @property
    def joints(self) -> int:
        """J."""
        if self.representation == "humanml3d":
            return len(HUMANML3D_PARENTS)
        return len(self.parents) or len(self.reference)

    @property
    def value_width(self) -> int:
        """Values of a frame."""
        widths = {"positions": 3 * self.joints, "rotations": 3 + 3 * self.joints, "humanml3d": HUMANML3D_WIDTH}
        return widths[self.representation]

    @property
    def feature_width(self) -> int:
        """Features of a frame, those that do not vary included."""
        widths = {"positions": PATH + 3 * (self.joints - 1), "rotations": PATH + 3 * self.joints}
        return widths.get(self.representation, HUMANML3D_WIDTH)

    def fitted(self, clips: Sequence[Tensor], statistics: tuple[Tensor, Tensor] | None = None) -> Motion:
        """The same with what it has to know of the training data.

        Args:
            clips: values (F, T) each.
            statistics: mean and std of all features, where they are published.
        """
        modality = self
        if self.representation != "humanml3d":
            places = [self.positions(clip[None])[0] for clip in clips]
            reference = tuple((float(x), float(z)) for x, z in heading_reference(places))
            modality = dataclasses.replace(self, reference=reference)
        features = [modality.features(clip[None])[0] for clip in clips]
        low = torch.stack([feature.amin(1) for feature in features]).amin(0)
        high = torch.stack([feature.amax(1) for feature in features]).amax(0)
        varies = high - low > 1e-4 * (1 + low.abs())
        if not varies.any():
            varies[0] = True  # nothing moves, and a model has to have a channel
        kept = varies.nonzero().flatten()
        mean, std = statistics or _statistics(features)
        return dataclasses.replace(
            modality,
            kept=tuple(kept.tolist()),
            constant=tuple(low.tolist()),
            mean=tuple(mean[kept].tolist()),
            std=tuple(std[kept].tolist()),
        )

    def features(self, values: Tensor) -> Tensor:
        """Values (B, F, T) to all features, float32 (B, G, T)."""
        if self.representation == "humanml3d":
            return values.float()
        places = self.positions(values)
        angles = heading(places, np.asarray(self.reference))
        path = path_steps(places[..., 0, :], angles)
        if self.representation == "positions":
            seen = turn(places[..., 1:, :] - places[..., :1, :], -angles[..., None])
        else:
            seen = _by_joint(values, 1)
            seen[..., 0, :] = turn_rotations(seen[..., 0, :], -angles)
        return _by_channel(path, seen).float()

    def normalise(self, values: Tensor) -> Tensor:
        """Values (B, F, T) to samples (B, C, T), on the CPU."""
        return super().normalise(self.features(values)[:, list(self.kept)])

    def restore(self, samples: Tensor) -> Tensor:
        """Samples (B, C, T) to values (B, F, T), float32 on the CPU: bodies on their paths."""
        kept = super().restore(samples.detach().float().cpu())
        features = kept.new_tensor(self.constant)[None, :, None].repeat(len(kept), 1, kept.shape[2])
        features[:, list(self.kept)] = kept
        if self.representation == "humanml3d":
            return features
        path = features[:, :PATH].double().permute(0, 2, 1).numpy()
        root, angles = follow_path(path)
        seen = _by_joint(features[:, PATH:], 0)
        if self.representation == "positions":
            return _by_channel(root, turn(seen, angles[..., None]) + root[..., None, :]).float()
        seen[..., 0, :] = turn_rotations(seen[..., 0, :], angles)
        return _by_channel(root, seen).float()

    def positions(self, values: Tensor) -> np.ndarray:
        """Joints (B, T, J, 3) by values (B, F, T)."""
        if self.representation == "positions":
            return _by_joint(values, 0)
        if self.representation == "rotations":
            seen = _by_joint(values, 0)
            return forward_kinematics(seen[..., 1:, :], seen[..., 0, :], self.parents, np.asarray(self.offsets))
        features = values.double().cpu().permute(0, 2, 1).numpy()
        # Turns are given as halves of their angles, the other way round; the steps are those to the next frame.
        path = np.roll(features[..., :PATH], 1, axis=1)[..., [0, 1, 3, 2]] * [-2, 1, 1, 1]
        path[..., 2] = features[..., 3]
        root, angles = follow_path(path)
        seen = features[..., PATH : PATH + 3 * (self.joints - 1)].reshape(*features.shape[:2], -1, 3)
        return np.concatenate([root[..., None, :], turn(seen, angles[..., None]) + root[..., None, :] * [1, 0, 1]], -2)

    def skeletons(self, samples: Tensor, lengths: Tensor | None = None) -> list[np.ndarray]:
        """Joints (T, J, 3) of each of the samples (N, C, T), cut to its length."""
        places = self.positions(self.restore(samples))
        return [place[: sample.shape[1]] for place, sample in zip(places, cut(samples, lengths), strict=True)]

    def overview(self, samples: Tensor, stem: Path, *, columns: int, lengths: Tensor | None = None) -> list[Path]:
        """A few moments of each as PNG, and all of it as an animated GIF."""
        clips = self.skeletons(samples, lengths)
        picture = save_strips(clips, self.parents, add_suffix(stem, ".png"), columns=columns)
        return [picture, save_film(clips, self.parents, self.fps, add_suffix(stem, ".gif"), columns=columns)]

    def save(self, sample: Tensor, stem: Path) -> Path:
        """Joints as .npz, which can be trained on again, and a GIF beside it."""
        places = self.skeletons(sample[None])[0]
        arrays = {"positions": places.astype(np.float32), **self._skeleton()}
        path = save_arrays(add_suffix(stem, ".npz"), arrays, compressed=True)
        save_film([places], self.parents, self.fps, add_suffix(stem, ".gif"), columns=1)
        return path

    def _skeleton(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"fps": np.float32(self.fps)}
        return facts | {"parents": np.asarray(self.parents, np.int64)} if self.parents else facts

    def arrays(self, samples: Tensor, lengths: Tensor | None = None) -> dict[str, np.ndarray]:
        """Joints float32 (N, T, J, 3), zeros beyond lengths, and lengths int64 (N,); of HumanML3D its features too."""
        values = self.restore(samples)
        places = self.positions(values).astype(np.float32)
        full = np.full(len(samples), samples.shape[2]) if lengths is None else lengths.cpu().numpy()
        places[np.arange(samples.shape[2]) >= full[:, None]] = 0
        arrays = {"positions": places, "lengths": full.astype(np.int64), **self._skeleton()}
        return arrays | {"features": values.mT.numpy()} if self.representation == "humanml3d" else arrays


def _statistics(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of all features; joints that hardly ever move are not enlarged to what others do."""
    mean, std = (torch.tensor(part) for part in channel_statistics(features))
    floor = LEAST_SPREAD * std[PATH:].median() if len(std) > PATH else std
    std[PATH:] = std[PATH:].clamp_min(floor)
    return mean, std


def _by_joint(values: Tensor, skip: int) -> np.ndarray:
    """(B, 3·J, T) to float64 (B, T, J - skip, 3)."""
    array = values.detach().double().cpu().permute(0, 2, 1).numpy()
    return array.reshape(*array.shape[:2], -1, 3)[:, :, skip:].copy()


def _by_channel(first: np.ndarray, others: np.ndarray) -> Tensor:
    """(B, T, A) and (B, T, J, 3) to (B, A + 3·J, T)."""
    return torch.from_numpy(np.concatenate([first, others.reshape(*first.shape[:2], -1)], -1)).permute(0, 2, 1)
