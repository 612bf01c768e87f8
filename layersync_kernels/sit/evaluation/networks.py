"""What networks see of samples, for distances: of images, films and sounds; of motion see `motion_classifier`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from ...errors import CheckpointError, ConfigError, TeacherError, UserError, first_line
from ..console import console
from ..extras import optional_module
from ..files import sha256
from ..modality.audio import resampled
from ..modality.images import pixels_to_unit
from ..teachers.grids import SPEECH, SpeechNetwork
from ..teachers.networks import load_teacher
from .arrays import Arrays
from .validation import CHUNK

INCEPTION, I3D, CLAP = "inception", "i3d", "clap"
SPATIAL_CHANNELS = 7
"""Channels of a feature map that sFID compares place by place: Nash et al. 2021 (arXiv:2103.03841), and ADM's suite."""
PARTS = 8
"""Equal parts of a sound, over each of which the states of a network are averaged for a probe."""
_INNER = {"efficientnet-lite0": "_blocks.10"}
"""Modules whose maps are compared place by place, of networks whose last map is too small."""
_HEADS = {"efficientnet-lite0": "_fc"}
"""Classifiers of averaged features."""
_INCEPTION_MAP = "Mixed_6d.branch1x1.conv"
"""What ADM's suite calls mixed_6/conv."""


@dataclass(frozen=True)
class Seen:
    """What a network sees of N samples.

    Attributes:
        sets: features by name, fp32 (N, F) each; "features" are those that all metrics are taken of.
        logits: of a classifier (N, K); None: there is none.
    """

    sets: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def features(self) -> Tensor:
        """The set of that name."""
        return self.sets["features"]

    def __getitem__(self, index: slice | Tensor) -> Seen:
        """Some of the samples."""
        sets = {name: own[index] for name, own in self.sets.items()}
        return Seen(sets, None if self.logits is None else self.logits[index])

    @classmethod
    def cat(cls, parts: Sequence[Seen]) -> Seen:
        """One after the other."""
        sets = {name: torch.cat([part.sets[name] for part in parts]) for name in parts[0].sets}
        logits = [part.logits for part in parts if part.logits is not None]
        return cls(sets, torch.cat(logits) if logits else None)


class Network(ABC):
    """Samples to features. A subclass gives `see`, and what `name` and `identity` are.

    Attributes:
        name: for the report.
        identity: what cached features have to be of: the name, and all that changes the features.
        directions: principal directions in which Fréchet distances are taken by default, so few that 1,000 samples
            fill them; None: all dimensions.
        chunk: samples at a time.
    """

    name: str
    identity: str
    directions: int | None = 256
    chunk: int = CHUNK

    @abstractmethod
    def see(self, arrays: Arrays) -> Seen:
        """Of a few samples."""

    @torch.no_grad()
    def __call__(self, arrays: Arrays, what: str) -> Seen:
        """Of all samples.

        Args:
            arrays: the samples; those without a dimension belong to all of them.
            what: they are, for the progress bar and for messages.

        Raises:
            TeacherError: features that are not finite; says of how many samples.
        """
        count = max(len(own) for own in arrays.values() if own.ndim)
        starts = range(0, count, self.chunk)
        parts = []
        quiet = not console.is_terminal
        for start in track(starts, f"features, {what}", console=console, transient=True, disable=quiet):
            parts.append(self.see({n: a[start : start + self.chunk] if a.ndim else a for n, a in arrays.items()}))
        seen = Seen.cat(parts)
        for own in (*seen.sets.values(), *([] if seen.logits is None else [seen.logits])):
            bad = int((~own.isfinite().flatten(1).all(1)).sum())
            if bad:
                raise TeacherError(
                    f"the features by {self.name} of {bad} of {count} {what} samples are not finite (NaN or "
                    "infinity), so no distance is taken; check the samples and the network's weights"
                )
        return seen


def _units(pixels: np.ndarray) -> Tensor:
    """uint8 (N, H, W, C) to (N, C, H, W) in [-1, 1]."""
    return pixels_to_unit(torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2))


class ImageNetwork(Network):
    """A network of `load_teacher`: its last features, averaged over the image, and some of a map, place by place.

    Args:
        name: of `load_teacher`.
        device: where it runs.
        size: side of its images; None: its own.
        weights: a file of its weights; None: its own.

    Raises:
        ConfigError, TeacherError, CheckpointError: see `load_teacher`.
    """

    def __init__(self, name: str, device: torch.device, *, size: int | None, weights: Path | None) -> None:
        try:
            self._teacher = load_teacher(name, size=size, weights=weights, last=True).to(device)
        except UserError as error:
            raise type(error)(f"--features {name}: {error}") from error
        self.name = name
        self.identity = f"{name}, images of {self._teacher.size}, {_checksum(weights)}"
        self._map: Tensor | None = None
        network = self._teacher.network
        self._head = network.get_submodule(_HEADS[name]) if name in _HEADS else None
        if name in _INNER:
            network.get_submodule(_INNER[name]).register_forward_hook(self._keep)

    def _keep(self, module: Any, given: Any, output: Tensor) -> None:
        self._map = output.flatten(2).transpose(1, 2)

    def see(self, arrays: Arrays) -> Seen:
        """Of uint8 (N, H, W, C) under "arr_0": "features" and "spatial", and logits where the network has a head."""
        images = _units(arrays["arr_0"])
        tokens = self._teacher(images.to(self._teacher.device))
        places = tokens if self._map is None else self._map
        features = tokens.mean(1)
        logits = None if self._head is None else self._head(features).float().cpu()
        return Seen({"features": features.float().cpu(), "spatial": _places(places)}, logits)


def _places(tokens: Tensor) -> Tensor:
    return tokens[..., :SPATIAL_CHANNELS].flatten(1).float().cpu()


class InceptionNetwork(Network):
    """InceptionV3 as FID takes it, by torch-fidelity, whose weights are those of TensorFlow's graph of 2015.

    Args:
        device: where it runs.
        weights: the file that torch-fidelity names weights-inception-2015-12-05-*.pth.

    Raises:
        ConfigError: no file, or torch-fidelity is missing.
        CheckpointError: the file is not of these weights.
    """

    name = INCEPTION
    directions = None
    chunk = 64

    def __init__(self, device: torch.device, weights: Path | None) -> None:
        module = optional_module(
            "torch_fidelity.feature_extractor_inceptionv3", f"--features {INCEPTION}", "layersync_kernels[fid]"
        )
        if weights is None:
            raise ConfigError(
                f"--features {INCEPTION} needs its weights: fetch {module.URL_INCEPTION_V3} and give the file by "
                "--features-weights; or take --features efficientnet-lite0, which pip brings"
            )
        try:
            torch.load(weights, "cpu", weights_only=True)  # torch-fidelity would run what a pickle names
            self._network = module.FeatureExtractorInceptionV3(
                INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
            ).to(device)
        except Exception as error:  # whatever a file makes of it
            raise CheckpointError(f"--features-weights {weights}: {first_line(error)}") from error
        self.identity = f"{INCEPTION}, {_checksum(weights)}"
        self._device = device
        self._network.get_submodule(_INCEPTION_MAP).register_forward_hook(self._keep)

    def _keep(self, module: Any, given: Any, output: Tensor) -> None:
        self._map = output.flatten(2).transpose(1, 2)

    def see(self, arrays: Arrays) -> Seen:
        """Of uint8 (N, H, W, C) under "arr_0"."""
        pixels = torch.from_numpy(np.ascontiguousarray(arrays["arr_0"])).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        features, logits = self._network(pixels.to(self._device))
        return Seen({"features": features.cpu(), "spatial": _places(self._map)}, logits.cpu())


class FilmNetwork(Network):
    """A network of images on the frames of films.

    "features" are its features averaged over the frames; "changes" how much they change from frame to frame, the mean
    of absolute differences.

    Args:
        images: the network.
    """

    chunk = 32

    def __init__(self, images: ImageNetwork) -> None:
        self._images = images
        self.name, self.identity = images.name, f"films, {images.identity}"

    def see(self, arrays: Arrays) -> Seen:
        """Of uint8 (N, T, H, W, C) under "videos"."""
        films = arrays["videos"]
        own = self._images.see({"arr_0": films.reshape(-1, *films.shape[2:])}).features.unflatten(0, films.shape[:2])
        changes = own.diff(dim=1).abs().mean(1) if own.shape[1] > 1 else torch.zeros_like(own[:, 0])
        return Seen({"features": own.mean(1), "changes": changes})


class FilmClassifier(Network):
    """I3D on films, as FVD takes it (Unterthiner et al. 2018, arXiv:1812.01717): a TorchScript file.

    Args:
        device: where it runs.
        weights: the file, such as i3d_torchscript.pt of StyleGAN-V.

    Raises:
        ConfigError: no file.
        CheckpointError: it cannot be loaded.
    """

    name = I3D
    directions = None
    chunk = 16

    def __init__(self, device: torch.device, weights: Path | None) -> None:
        if weights is None:
            raise ConfigError(
                f"--features {I3D} needs the network itself: a TorchScript file such as i3d_torchscript.pt of "
                "StyleGAN-V, by --features-weights; or take --features efficientnet-lite0, which pip brings"
            )
        try:
            self._network = torch.jit.load(str(weights), map_location=device).eval()
        except Exception as error:  # whatever a file makes of it
            raise CheckpointError(
                f"--features-weights {weights} is no TorchScript file: {first_line(error)}"
            ) from error
        self.identity, self._device = f"{I3D}, {_checksum(weights)}", device

    def see(self, arrays: Arrays) -> Seen:
        """Of uint8 (N, T, H, W, C) under "videos"."""
        films = torch.from_numpy(np.ascontiguousarray(arrays["videos"])).permute(0, 4, 1, 2, 3)
        films = films.expand(-1, 3, -1, -1, -1).to(self._device).float()
        try:
            return Seen({"features": self._network(films, rescale=True, resize=True, return_features=True).cpu()})
        except Exception as error:  # whatever a foreign network raises
            raise TeacherError(
                f"--features {I3D} cannot take films of {films.shape[2]} frames of {films.shape[3]}x{films.shape[4]}: "
                f"{first_line(error)}"
            ) from error


class SpeechFeatures(Network):
    """States of Resemblyzer's network: "features" are their mean over a sound, "parts" over each of `PARTS` of it.

    Raises:
        TeacherError: the package is missing.
    """

    name = SPEECH
    identity = f"{SPEECH}, {PARTS} parts"
    directions = 64

    def __init__(self, device: torch.device) -> None:
        try:
            with torch.random.fork_rng(devices=[]):
                self._network = SpeechNetwork().to(device)
        except TeacherError as error:
            raise TeacherError(str(error).replace("--teacher", "--features")) from error

    def see(self, arrays: Arrays) -> Seen:
        """Of waveforms float32 (N, L), their "lengths" and "sample_rate"."""
        means, rows = [], []
        for sound, length in zip(arrays["waveforms"], arrays["lengths"].tolist(), strict=True):
            states = self._network.states(sound[:length], int(arrays["sample_rate"])).cpu()
            means.append(states.mean(0))
            rows.append(torch.cat([part.mean(0) for part in torch.tensor_split(states, PARTS)]).nan_to_num())
        return Seen({"features": torch.stack(means), "parts": torch.stack(rows)})


class ClapFeatures(Network):
    """The audio embedding of CLAP (Wu et al. 2023, arXiv:2211.06687), by transformers; of music and sounds of any kind.

    Of sounds longer than its window (10 s), the mean over windows. "parts", for a probe, are the same.

    Args:
        device: where it runs.
        folder: of a model of transformers, such as a copy of laion/clap-htsat-unfused, as safetensors.

    Raises:
        ConfigError: no folder, or transformers is missing.
        CheckpointError: the folder is not of such a model.
    """

    name = CLAP
    directions = 64

    def __init__(self, device: torch.device, folder: Path | None) -> None:
        module = optional_module("transformers", f"--features {CLAP}", "layersync_kernels[integrations]")
        if folder is None:
            raise ConfigError(
                f"--features {CLAP} needs the network itself: a folder of transformers such as a copy of "
                f"laion/clap-htsat-unfused, by --features-weights; or take --features {SPEECH}, which pip brings"
            )
        try:
            self._extractor = module.ClapFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
            network, facts = module.ClapAudioModelWithProjection.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # whatever a folder makes of it
            raise CheckpointError(f"--features-weights {folder} is no CLAP: {first_line(error)}") from error
        if missing := sorted(facts["missing_keys"]):  # which transformers fills with random numbers
            raise CheckpointError(f"--features-weights {folder} lacks {len(missing)} tensors, such as {missing[0]}")
        self._network = network.to(device).eval()
        own = sorted(folder.glob("*.safetensors"))
        self.identity, self._device = f"{CLAP}, {' '.join(map(_checksum, own))}", device

    def see(self, arrays: Arrays) -> Seen:
        """Of waveforms float32 (N, L), their "lengths" and "sample_rate"."""
        rate, window = self._extractor.sampling_rate, self._extractor.nb_max_samples
        rows = []
        for sound, length in zip(arrays["waveforms"], arrays["lengths"].tolist(), strict=True):
            wide = resampled(sound[:length], int(arrays["sample_rate"]), rate)
            parts = [wide[start : start + window] for start in range(0, len(wide), window)]
            given = self._extractor(parts, sampling_rate=rate, return_tensors="pt", truncation="rand_trunc")
            embeds = self._network(input_features=given["input_features"].to(self._device)).audio_embeds
            rows.append(embeds.float().mean(0).cpu())
        features = torch.stack(rows)
        return Seen({"features": features, "parts": features})


def _checksum(path: Path | None) -> str:
    """SHA-256 of a file; "packaged" for None."""
    if path is None:
        return "packaged"
    try:
        return sha256(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
