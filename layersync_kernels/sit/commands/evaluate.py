"""`layersync evaluate`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, DataError
from ..checkpoints.local import run_of
from ..checkpoints.weights import find_weights
from ..config import at_least, require
from ..config.data import DataConfig
from ..config.run import SAMPLES, OfRun
from ..config.sampling import SamplingConfig, TransportConfig
from ..console import start_logging
from ..data.base import SampleSet
from ..data.registry import load_data
from ..device import resolve_device
from ..evaluation.arrays import LEAST, check_samples, joined, kind_of, read_samples, some, write_samples
from ..evaluation.controls import Real, kept, see_real
from ..evaluation.frechet import RealFeatures
from ..evaluation.measure import Group, distance_names, measure, posteriors
from ..evaluation.motion_classifier import CLASSIFIER, MotionNetwork
from ..evaluation.networks import Network, Seen
from ..evaluation.probes import linear_scores
from ..evaluation.registry import as_recorded, kept_in, load_network
from ..evaluation.report import Evaluation, sampling_facts
from ..files import write_json
from ..sampling.load import Trained, load_trained
from ..teachers.features import fingerprint
from .arguments import parse_of_run
from .sample import SampleCommand, sample

PROBED = 1500
"""Training sounds that the probe of classes is fitted to, at most."""


@dataclass(frozen=True)
class EvaluateCommand(OfRun):
    """Measure how far samples of a model are from real ones, with intervals and controls.

    Samples are drawn as `layersync sample --number` draws them, and kept: called again, it goes on where it was.
    """

    samples: int = 1000
    """Samples to draw, with the classes of the real ones."""
    samples_from: Path | None = None
    """Evaluate the samples of this .npz instead: uint8 (N, H, W, C) under "arr_0", as ADM's suite has them, or what
    `layersync sample --number` writes of other data."""
    samples_to: Path | None = None
    """Also write all samples into one .npz, for images in the layout of ADM's suite."""
    real_to: Path | None = None
    """Also write the real samples into one such file."""
    json: Path | None = None
    """Also write all numbers, and what they depend on, into this file."""
    features: str | None = None
    """Network that sees the samples; of images and films: efficientnet-lite0, timm/NAME, dinov2-vitb14 and what else
    --teacher takes, inception of images, i3d of films; of sounds: resemblyzer, clap; of motion: motion-classifier,
    which is trained here. Default: the one that needs no download."""
    features_weights: Path | None = None
    """File of that network's weights; of clap, its folder."""
    features_size: int | None = None
    """Side of the images that the network gets; None: its own, and 64 of films."""
    directions: int | None = None
    """Principal directions of the real features in which Fréchet distances are taken; 0: all dimensions, as FID is;
    default: 256 of images and films, 64 of sounds, all with inception, i3d and motion-classifier."""
    reference: int = 5000
    """Real samples, at most."""
    real_split: Literal["auto", "all", "train", "test"] = "auto"
    """Where they come from; auto: the test split of a run on the training split, else the data of the run."""
    real_cache: Path | None = None
    """Folder for features of real samples and of controls, computed once per data set; default: in the user's cache."""
    resamples: int = 100
    """Resamples behind each interval."""
    out: Path | None = None
    """Folder of the samples; default: in samples/ of the run, by their settings."""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    weights: str = "ema"
    """The averaged weights, or the last ones: ema | model | ema-DECAY of a run with several averages."""
    batch_size: int = 256
    """Samples drawn at once."""
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        at_least(LEAST, samples=self.samples, reference=self.reference)
        at_least(2, resamples=self.resamples)
        at_least(1, features_size=self.features_size, batch_size=self.batch_size)
        at_least(0, seed=self.seed, directions=self.directions)
        require(self.directions != 1, "--directions 1: expected 0 or at least 2")
        self.data.validate()
        self.sampling.validate()


def evaluate(command: EvaluateCommand) -> Evaluation:
    """Draws, measures and writes what `command` asks for.

    Raises:
        UserError: anything wrong with the checkpoint, the data, the network or the settings.
    """
    command.validate()
    device = resolve_device(command.device)
    trained = load_trained(command.source, which=command.weights)
    folder = command.real_cache or kept_in()
    config, split = _real_config(command)
    real_set, represented = _real_set(config, trained)
    kind = kind_of(real_set.modality)
    network = load_network(
        command.features,
        kind,
        device,
        splits=lambda: _splits(config, real_set),
        folder=folder,
        weights=command.features_weights,
        size=command.features_size,
    )
    source = f"--data {config.data}"
    real = see_real(network, real_set, command.reference, folder, source=source, represented=represented)
    if command.real_to is not None:
        write_samples(command.real_to, *some(real_set, command.reference, source))
    arrays, labels, about = _samples(command, trained, real, kind, config)
    check_samples(arrays, some(real_set, LEAST, source)[0], kind, about.get("file", "the model"))
    if command.samples_to is not None:
        write_samples(command.samples_to, arrays, labels)
    seen = network(arrays, "drawn" if command.samples_from is None else "given")
    if kind == "audio":
        seen, real = _heard(network, config, real_set, seen, real, folder)
    directions = network.directions if command.directions is None else command.directions or None
    report = _measured(command, kind, network, real, Group(seen, labels), directions)
    dimensions = {
        name: RealFeatures(real.seen.sets[key], directions).dimensions
        for key, name in distance_names(kind, network.name).items()
    }
    settings = {
        "kind": kind,
        "features": network.name,
        "dimensions": dimensions,
        "resamples": command.resamples,
        "real": {"data": config.data, "split": split, "count": len(real.seen)},
        "samples": about | {"count": len(seen)},
    }
    notes = _notes(command, trained, split, kind, labels)
    if isinstance(network, MotionNetwork):
        settings["network"] = dataclasses.asdict(network.facts)
        own = network.facts
        notes.append(
            f"{CLASSIFIER} was trained on {own.trained_on} real windows; it names {own.accuracy:.1%} of {own.windows} "
            f"of the test split (SHA-256 {own.sha256[:12]}...)"
        )
    evaluation = dataclasses.replace(report, settings=settings, notes=tuple(notes))
    if command.json is not None:
        try:
            write_json(command.json, evaluation.content())
        except OSError as error:
            raise ConfigError(f"cannot write --json {command.json}: {error}") from error
    return evaluation


def _real_config(command: EvaluateCommand) -> tuple[DataConfig, str]:
    """The data of real samples, and which of them, in words."""
    wanted = command.real_split
    if wanted == "auto":
        wanted = "test" if command.data.split == "train" else command.data.split
    seen = {"test": "test split", "train": "training split", "all": "all, the model was trained on them"}
    return dataclasses.replace(command.data, split=wanted, flip=False), seen[wanted]


def _real_set(config: DataConfig, trained: Trained) -> tuple[SampleSet, SampleSet | None]:
    """Real samples; of sounds as they are, and beside them as the run represents them."""
    try:
        data = load_data(config)
    except DataError as error:
        raise DataError(f"{error}; give the data of real samples by --data") from error
    plain = as_recorded(config, data.modality)
    return (data, None) if plain is None else (load_data(plain), data)


def _splits(config: DataConfig, real: SampleSet) -> tuple[SampleSet, SampleSet]:
    """The training split, and the test split."""
    train, test = (
        real if split == config.split else load_data(dataclasses.replace(config, split=split))
        for split in ("train", "test")
    )
    return train, test


def in_proportion(labels: Tensor, count: int) -> tuple[int, ...]:
    """So many classes, in the proportions of labels (N,) and in random order."""
    places = (torch.arange(count, dtype=torch.float64) + 0.5) * len(labels) / count
    chosen = labels.sort().values[places.long()]
    return tuple(chosen[torch.randperm(count, generator=torch.Generator().manual_seed(0))].tolist())


def _samples(
    command: EvaluateCommand, trained: Trained, real: Real, kind: str, config: DataConfig
) -> tuple[dict[str, np.ndarray], Tensor | None, dict[str, Any]]:
    """The samples, the classes that were asked for, and how they came to be."""
    if command.samples_from is not None:
        arrays, labels = read_samples(command.samples_from, kind, trained.modality, config)
        return arrays, labels, {"file": str(command.samples_from)}
    told = trained.num_classes > 1 and trained.text_encoder is None
    classes = in_proportion(real.labels, command.samples) if told else ()
    own = command.sampling
    about: dict[str, Any] = {
        "checkpoint": str(find_weights(command.source)),
        "weights": command.weights,
        **sampling_facts(own),
        "seed": command.seed,
    }
    settings = json.dumps([about, command.samples, classes, dataclasses.asdict(command.transport)])
    name = f"evaluate-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    run = run_of(command.source)
    with tempfile.TemporaryDirectory() as temporary:
        folder = command.out or (run / SAMPLES / name if run is not None else Path(temporary) / name)
        sample(
            SampleCommand(
                command.source,
                out=folder,
                classes=classes,
                number=command.samples,
                seed=command.seed,
                sampling=own,
                transport=command.transport,
                weights=command.weights,
                batch_size=command.batch_size,
                device=command.device,
                precision=command.precision,
            )
        )
        count = len(sorted(folder.glob("samples_*.npz")))
        parts = [read_samples(folder / f"samples_{i:05d}.npz", kind, trained.modality, config) for i in range(count)]
    labels = torch.cat([part for _, part in parts if part is not None])
    return joined([part for part, _ in parts]), labels if trained.num_classes > 1 else None, about


def _heard(
    network: Network, config: DataConfig, real_set: SampleSet, seen: Seen, real: Real, folder: Path
) -> tuple[Seen, Real]:
    """Sounds and real ones with the posteriors of a linear probe, fitted to training sounds, as logits."""
    if real_set.num_classes < 2:
        return seen, real
    plain = dataclasses.replace(config.audio, sound="waveform")
    train = load_data(dataclasses.replace(config, split="train", audio=plain))
    count = min(PROBED, len(train))

    def compute() -> dict[str, Tensor]:
        arrays, labels = some(train, count, f"--data {config.data}")
        return {"parts": network(arrays, "training").sets["parts"], "labels": labels}

    facts = {"network": network.identity, "data": fingerprint(train), "count": count}
    fitted = kept(folder, "probe", facts, compute)
    groups = {"": seen, "all": real.seen, **real.controls}
    both = torch.cat([fitted["parts"], *(own.sets["parts"] for own in groups.values())])
    scores = posteriors(linear_scores(both, fitted["labels"], train.num_classes))
    parts = scores.split([len(own) for own in groups.values()])
    told = {name: Seen(own.sets, part) for (name, own), part in zip(groups.items(), parts, strict=True)}
    return told.pop(""), Real(told.pop("all"), real.labels, told)


def _measured(
    command: EvaluateCommand, kind: str, network: Network, real: Real, given: Group, directions: int | None
) -> Evaluation:
    """The numbers, and those of the controls."""
    found = measure(
        kind, network.name, Group(real.seen, real.labels), given, times=command.resamples, directions=directions
    )
    rest = Group(real.rest, real.rest_labels)
    controls = {}
    for name, seen in real.controls.items():
        own = Group(seen, real.labels[: len(seen)])
        controls[name] = len(seen), measure(kind, network.name, rest, own, times=0, directions=directions)
    return Evaluation({}, found, controls)


def _notes(command: EvaluateCommand, trained: Trained, split: str, kind: str, labels: Tensor | None) -> list[str]:
    notes = []
    if split.startswith(("all", "training")):
        notes.append("the real samples are those that the model was trained on: copies of them would look good")
    if labels is None and kind in ("audio", "motion") and trained.num_classes > 1:
        notes.append("the samples come without classes: what depends on those is left out")
    return notes


def evaluate_main(argv: Sequence[str]) -> int:
    """`layersync evaluate`."""
    start_logging()
    evaluate(parse_of_run(EvaluateCommand, argv, command="evaluate")).show()
    return 0
