"""Teachers of films, of sounds and of whatever a user's own network knows: their tokens lie on the model's grid."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError, TeacherError, first_line
from ..data.user import is_python_path, user_object
from ..modality.audio import Sound, resampled
from ..modality.base import Modality, cut
from ..modality.images import Images
from ..modality.video import Video
from .base import Teacher, not_finite
from .networks import load_teacher

_MODES = ("linear", "bilinear", "trilinear")
SPEECH = "resemblyzer"
_RATE, _LOUDNESS = 16_000, 10 ** (-30 / 20)  # samples a second, and the root mean square, that its network is used to


def on_grid(features: Tensor, grid: Sequence[int]) -> Tensor:
    """Features (B, W, ...) of one to three dimensions as tokens (B, N, W) of a grid, row by row, interpolated."""
    if features.shape[2:] != tuple(grid):
        features = F.interpolate(features.float(), tuple(grid), mode=_MODES[len(grid) - 1])
    return features.flatten(2).transpose(1, 2)


class GridTeacher(nn.Module, ABC):
    """A frozen network whose tokens are those of a model's grid.

    Args:
        name: as the user gave it.
        grid: tokens of the model along each dimension of a sample.
        modality: what samples stand for.
    """

    def __init__(self, name: str, grid: Sequence[int], modality: Modality) -> None:
        super().__init__()
        self.name, self.grid, self.modality = name, tuple(grid), modality
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.get_buffer("_place").device

    @property
    def size(self) -> str:
        """Of the grid."""
        return "x".join(map(str, self.grid))

    def train(self, mode: bool = True) -> GridTeacher:
        """Stays in evaluation mode."""
        return self

    @abstractmethod
    def forward(self, samples: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Samples of the model (B, C, ...), of `lengths` (B,), to tokens (B, N, W); zeros beyond a length."""

    def width(self, samples: Tensor, lengths: Tensor | None = None) -> int:
        """Channels of the tokens, learned from a few samples.

        Raises:
            TeacherError: the network fails, or what it gives are no finite tokens.
        """
        try:
            with torch.no_grad():
                tokens = self(samples, lengths)
        except Exception as error:  # whatever a foreign network raises
            raise TeacherError(
                f"the teacher {self.name} cannot take samples {tuple(samples.shape[1:])}: {first_line(error)}"
            ) from error
        if tokens.shape[:2] != (len(samples), math.prod(self.grid)) or tokens.ndim != 3:
            raise TeacherError(
                f"the teacher {self.name} gives {tuple(tokens.shape)} for {len(samples)} samples of {self.size} "
                "tokens; expected tokens (B, N, channels) or features (B, channels, ...) of as many dimensions"
            )
        if not tokens.isfinite().all():
            raise TeacherError(f"{not_finite(self.name)} for the first samples; check its weights, or use another")
        return tokens.shape[2]


class VideoTeacher(GridTeacher):
    """A teacher of images, which sees each frame; frames within a token are averaged."""

    def __init__(self, images: Teacher, grid: Sequence[int], modality: Modality) -> None:
        super().__init__(images.name, grid, modality)
        self.images = images

    @torch.no_grad()
    def forward(self, samples: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Films (B, C, T, H, W) in [-1, 1] to tokens (B, N, W)."""
        frames = samples.transpose(1, 2).flatten(0, 1)
        tokens = self.images(frames)  # (B·T, n, W)
        side = math.isqrt(tokens.shape[1])
        if side**2 != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens of a frame are no square; expected a grid")
        maps = tokens.transpose(1, 2).unflatten(2, (side, side)).unflatten(0, (len(samples), -1)).transpose(1, 2)
        maps = F.adaptive_avg_pool3d(maps.float(), (self.grid[0], side, side))
        return on_grid(maps, self.grid)


class SpeechNetwork(nn.Module):
    """The states of Resemblyzer's network, trained to tell speakers apart; its weights are in its package.

    Wan et al. 2018, "Generalized end-to-end loss for speaker verification".

    Raises:
        TeacherError: the package is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        spec = importlib.util.find_spec("resemblyzer")
        if spec is None or spec.origin is None:
            raise TeacherError("--teacher resemblyzer needs a package: pip install --no-deps Resemblyzer==0.1.4")
        state = torch.load(Path(spec.origin).parent / "pretrained.pt", "cpu", weights_only=True)["model_state"]
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True).eval().requires_grad_(False)
        self.lstm.load_state_dict({k.removeprefix("lstm."): v for k, v in state.items() if k.startswith("lstm.")})

    @torch.no_grad()
    def states(self, sound: np.ndarray, rate: int) -> Tensor:
        """A waveform float32 (L,) to (frames of 10 ms, 256)."""
        import librosa

        wide = resampled(sound, rate, _RATE)
        wide = wide * (_LOUDNESS / max(float(np.sqrt(np.mean(wide**2))), 1e-4))
        mel = librosa.feature.melspectrogram(y=wide, sr=_RATE, n_fft=400, hop_length=160, n_mels=40)
        own: Tensor = self.lstm(torch.from_numpy(mel.T.astype(np.float32))[None].to(next(self.parameters()).device))[0]
        return own[0]


class SpeechTeacher(GridTeacher):
    """`SpeechNetwork` on sounds. Of a spectrogram it hears Griffin-Lim's sound, which takes the CPU a while: features
    computed once are better.
    """

    def __init__(self, grid: Sequence[int], modality: Sound) -> None:
        super().__init__(SPEECH, grid, modality)
        with torch.random.fork_rng(devices=[]):
            self.network = SpeechNetwork()

    @torch.no_grad()
    def forward(self, samples: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Sounds (B, C, T) to tokens (B, N, 256), each interpolated over its own length."""
        assert isinstance(self.modality, Sound)
        patch = samples.shape[2] // self.grid[0]
        counts = [len(own[0]) for own in cut(samples, lengths)]
        rows = samples.new_zeros((len(samples), self.grid[0], self.network.lstm.hidden_size), dtype=torch.float32)
        for row, sound, count in zip(rows, self.modality.sounds(samples, lengths), counts, strict=True):
            tokens = min(-(-count // patch), self.grid[0])
            row[:tokens] = on_grid(self.network.states(sound, self.modality.sample_rate).T[None], (tokens,))[0]
        return rows


class UserTeacher(GridTeacher):
    """What FUNCTION of MODULE returns when it is given the modality: a module or function of values (B, C, ...) of the
    data and lengths (B,) or None, that gives tokens (B, N, W), or features (B, W, ...) which are interpolated.
    """

    def __init__(self, name: str, network: Callable[..., Tensor], grid: Sequence[int], modality: Modality) -> None:
        super().__init__(name, grid, modality)
        self.network = network.eval().requires_grad_(False) if isinstance(network, nn.Module) else network

    @torch.no_grad()
    def forward(self, samples: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Samples to tokens (B, N, W)."""
        features = self.network(self.modality.restore(samples), lengths)
        if features.ndim == 3 and features.shape[1] == math.prod(self.grid):
            return features
        return on_grid(features, self.grid)


def load_any(
    name: str, modality: Modality, grid: Sequence[int] | None, *, size: int | None = None, weights: Path | None = None
) -> Teacher | GridTeacher:
    """The teacher of that name for a kind of data.

    Args:
        name: see `load_teacher`, whose networks look at images, and at films frame by frame; "resemblyzer" of sounds;
            MODULE:FUNCTION of anything, see `UserTeacher`.
        modality: of the data.
        grid: tokens of the model along each dimension; None, of images: as their teacher likes it.
        size: of `load_teacher`.
        weights: of `load_teacher`.

    Raises:
        ConfigError: no such teacher of this kind of data.
        TeacherError, CheckpointError: see `load_teacher`.
    """
    if isinstance(modality, Images) and not is_python_path(name):
        return load_teacher(name, size=size, grid=None if grid is None else min(grid), weights=weights)
    assert grid is not None
    if is_python_path(name):
        try:
            with torch.random.fork_rng(devices=[]):  # initialisation must not move the numbers that training draws
                network: Any = user_object(name)(modality)
        except Exception as error:  # whatever a user's code raises
            raise TeacherError(f"--teacher {name}: {type(error).__name__}: {first_line(error)}") from error
        if not callable(network):
            raise TeacherError(f"--teacher {name} returned a {type(network).__name__}; expected a module or function")
        return UserTeacher(name, network, grid, modality)
    if isinstance(modality, Video):
        return VideoTeacher(load_teacher(name, size=size, grid=min(grid[1:]), weights=weights), grid, modality)
    if isinstance(modality, Sound) and name == SPEECH:
        return SpeechTeacher(grid, modality)
    known = f"{SPEECH}, or " if isinstance(modality, Sound) else ""
    raise ConfigError(
        f"--teacher {name}: no such teacher of {modality.kind}; expected {known}your own, MODULE:FUNCTION, or features "
        "that were computed elsewhere (--features FILE)"
    )
