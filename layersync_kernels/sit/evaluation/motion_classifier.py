"""A classifier of actions, whose features stand in for those of a pretrained network of motion, which nobody publishes.

As papers on action-to-motion do it (Guo et al. 2020, arXiv:2007.15240): trained on real windows of the training split.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ...errors import CheckpointError, ConfigError
from ...ops.attention import length_mask
from ..config.io import build, parse_json
from ..data.base import SampleSet
from ..data.memory import MemorySet
from ..files import atomic_path, write_json
from ..modality.motion import Motion
from ..teachers.features import fingerprint
from .arrays import Arrays
from .networks import Network, Seen

WIDTH, STEPS, BATCH = 64, 600, 64
CLASSIFIER = "motion-classifier"
_FORMAT = 1
"""Of what is kept; another one is trained anew."""


class MotionClassifier(nn.Module):
    """Convolutions over time on frames, averaged over those that are there.

    Args:
        channels: values of a frame.
        classes: actions.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(a, WIDTH, 5, padding=2) for a in (channels, WIDTH, WIDTH))
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(WIDTH, classes)
        self.register_buffer("size", torch.ones(()))  # root mean square of the features that training ends with

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T) and (B,) to features (B, `WIDTH`), of about 1, and logits (B, classes)."""
        there = length_mask(lengths, frames.shape[2])[:, None].float()
        x = frames.clamp(-5, 5) * there
        for convolution in self.convolutions:
            x = convolution(self.drop(x)).relu() * there
        features = x.sum(2) / there.sum(2)
        return features / self.get_buffer("size"), self.head(features)


def train_classifier(frames: Tensor, lengths: Tensor, labels: Tensor, classes: int) -> MotionClassifier:
    """On windows (N, C, T), classes in equal parts, lengths cut at random; the same for the same windows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MotionClassifier(frames.shape[1], classes)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.05)
        weights = 1 / torch.bincount(labels, minlength=classes).clamp_min(1)[labels].double()
        for _ in range(STEPS):
            index = torch.multinomial(weights, BATCH, replacement=True)
            own = (lengths[index] * torch.empty(BATCH).uniform_(0.6, 1)).long().clamp_min(1)
            loss = nn.functional.cross_entropy(network(frames[index], own)[1], labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        network.get_buffer("size").copy_(network.eval()(frames, lengths)[0].square().mean().sqrt().clamp_min(1e-6))
    return network


@dataclass(frozen=True)
class ClassifierFacts:
    """What is kept beside the weights of a classifier.

    Attributes:
        sha256: of the file of the weights.
        accuracy: on windows of the test split.
        windows: of the test split.
        trained_on: windows of the training split.
    """

    sha256: str
    accuracy: float
    windows: int
    trained_on: int


class MotionNetwork(Network):
    """`MotionClassifier` on the joints of bodies, whatever a run's own representation is.

    Trained on the training split once, and kept in `folder` with its checksum and its accuracy.

    Args:
        train: real windows, in memory.
        test: others, for its accuracy.
        folder: of the cache.

    Attributes:
        facts: see `ClassifierFacts`.

    Raises:
        ConfigError: data without classes, or not in memory.
        CheckpointError: the file that is kept is damaged; names it.
    """

    name = CLASSIFIER
    directions = None

    def __init__(self, train: SampleSet, test: SampleSet, folder: Path) -> None:
        if not isinstance(train, MemorySet) or not isinstance(test, MemorySet):
            raise ConfigError("the network of motion is trained on samples in memory; raise --memory-limit-gb")
        if train.num_classes < 2 or len(train.labels.unique()) < 2:
            raise ConfigError(
                "the network of motion is a classifier, and the data has one class: nothing can be measured on it; "
                "give data whose sub-folders, or labels, are actions"
            )
        self._modality: Motion | None = None
        self._modality = self._fit(train)
        path = folder / f"{CLASSIFIER}-{_FORMAT}-{fingerprint(train)[:16]}.safetensors"
        self._network = MotionClassifier(len(self._modality.kept), train.num_classes).eval()
        facts = path.with_suffix(".json")
        if not facts.is_file():
            self._train(train, test, path)
        self.facts = _read_facts(facts)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}; delete {facts}, and it is trained anew") from error
        if hashlib.sha256(content).hexdigest() != self.facts.sha256:
            raise CheckpointError(
                f"{path} is not what was written (its checksum differs from {facts.name}); delete both"
            )
        self._network.load_state_dict(load(content))
        self.identity = f"{CLASSIFIER}, {self.facts.sha256}"

    @staticmethod
    def _fit(train: MemorySet) -> Motion:
        assert isinstance(train.modality, Motion)
        arrays = _arrays(train)
        own = Motion(representation="positions", fps=train.modality.fps, parents=train.modality.parents)
        if not own.parents:
            joints = arrays["positions"].shape[2]
            own = dataclasses.replace(own, reference=((0.0, 0.0),) * joints)
        return own.fitted([_values(clip) for clip in _clips(arrays)])

    def _train(self, train: MemorySet, test: MemorySet, path: Path) -> None:
        frames, lengths = self._frames(_arrays(train))
        self._network = train_classifier(frames, lengths, train.labels.cpu(), train.num_classes)
        with torch.no_grad():
            right = self._network(*self._frames(_arrays(test)))[1].argmax(1) == test.labels.cpu()
        content = save(self._network.state_dict())
        known = ClassifierFacts(
            hashlib.sha256(content).hexdigest(), float(right.double().mean()), len(test), len(train)
        )
        try:
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
            write_json(path.with_suffix(".json"), dataclasses.asdict(known))
        except OSError as error:
            raise CheckpointError(
                f"cannot keep the network of motion: {error}; give `layersync evaluate` another --real-cache, or the "
                "cache of the user another folder by XDG_CACHE_HOME"
            ) from error

    def _frames(self, arrays: Arrays) -> tuple[Tensor, Tensor]:
        """Joints as the network takes them: (N, C, T) and lengths (N,)."""
        assert self._modality is not None
        clips = _clips(arrays)
        lengths = torch.tensor([len(clip) for clip in clips])
        frames = torch.zeros(len(clips), len(self._modality.kept), int(lengths.max()))
        for row, clip in zip(frames, clips, strict=True):
            row[:, : len(clip)] = self._modality.normalise(_values(clip)[None])[0]
        return frames, lengths

    def see(self, arrays: Arrays) -> Seen:
        """Of "positions" float32 (N, T, J, 3) and "lengths"."""
        features, logits = self._network(*self._frames(arrays))
        return Seen({"features": features}, logits)


def _read_facts(path: Path) -> ClassifierFacts:
    try:
        return build(ClassifierFacts, parse_json(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; delete it, and it is trained anew") from error


def _arrays(data: MemorySet) -> dict[str, np.ndarray]:
    return data.modality.arrays(data.samples.cpu(), data.lengths)


def _clips(arrays: Arrays) -> list[np.ndarray]:
    """(T, J, 3) each."""
    return [clip[:length] for clip, length in zip(arrays["positions"], arrays["lengths"].tolist(), strict=True)]


def _values(clip: np.ndarray) -> Tensor:
    """(T, J, 3) to values (3·J, T)."""
    return torch.from_numpy(np.ascontiguousarray(clip, np.float32)).flatten(1).T.contiguous()
