"""Measures the blocks of trained SiTs, to choose a pair for LayerSync: what each knows, and how alike they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ....errors import CheckpointError, ConfigError, DataError
from ...checkpoints.local import run_of
from ...checkpoints.weights import find_weights
from ...data.base import SampleSet
from ...data.registry import load_data
from ...device import resolve_device, resolve_precision
from ...diffusion.transport import build_transport
from ...files import write_json
from ...sampling.load import Trained, load_trained
from .analyse import analyse
from .config import MIN_SAMPLES, ProbeCommand
from .measure import measure
from .plots import save_probe
from .report import PICTURE, Report, print_report
from .several import check_same_data, names_of
from .teacher import teacher_features, teacher_of


def probe(command: ProbeCommand) -> Path:
    """Measures as `command` asks, prints, writes the picture and the numbers, and returns the path of the picture.

    Raises:
        UserError: anything wrong with a checkpoint, the data, the teacher or the settings.
    """
    command.validate()
    device = resolve_device(command.device)
    sources = (command.source, *command.beside)
    names = names_of(sources)
    loaded = [_load(command, source) for source in sources]
    trained, *others = loaded
    for other, beside in zip(command.beside, others, strict=True):
        check_same_data(command.source, trained, other, beside)
    data = _data(command, trained, device)
    taken: dict[str, Any] = {
        "samples": command.samples,
        "batch_size": command.batch_size,
        "seed": command.seed,
        "device": device,
        "autocast_dtype": resolve_precision(command.precision, device),
        "progress": True,
    }
    seen = None
    if (teacher := teacher_of(command, data, trained.model)) is not None:
        seen = teacher_features(teacher, trained.model, data, **taken)
    interpolant = build_transport(command.transport).interpolant
    reports: dict[str, Report] = {}
    for name, source, own in zip(names, sources, loaded, strict=True):
        model = own.model.to(device)
        states = measure(model, interpolant, data, times=command.times, **taken)
        model.cpu()  # one at a time on the device
        reports[name] = analyse(
            states,
            times=command.times,
            null_label=model.guidable,
            checkpoint=str(find_weights(source)),
            teacher=seen,
        )
        print_report(reports[name], name if command.beside else None)
    return _write(command, reports)


def _load(command: ProbeCommand, source: Path) -> Trained:
    trained = load_trained(source, which=command.weights, num_heads=command.num_heads)
    if trained.model.depth < 2:
        raise ConfigError(f"{source} has {trained.model.depth} block; a pair needs a model of at least 2")
    return trained


def _data(command: ProbeCommand, trained: Trained, device: torch.device) -> SampleSet:
    """The samples to probe with, which fit the model."""
    try:
        data = load_data(command.data, device)
    except DataError as error:
        raise DataError(f"{error}; give the data to probe with by --data") from error
    if data.spec != trained.spec:
        raise DataError(
            f"--data {command.data.data} has samples of {data.spec}, the model was trained on {trained.spec}; "
            "give other --data, --image-size or --channels"
        )
    if len(data) < MIN_SAMPLES:
        raise DataError(f"--data {command.data.data} has {len(data)} samples; expected at least {MIN_SAMPLES}")
    return data


def _write(command: ProbeCommand, reports: dict[str, Report]) -> Path:
    """The numbers and the picture, whose path is returned."""
    run = run_of(command.source)
    picture = command.out or (run / PICTURE if run else command.source.with_name(f"{command.source.stem}-{PICTURE}"))
    contents = {name: dataclasses.asdict(report) for name, report in reports.items()}
    first, *others = ({"name": name} | content for name, content in contents.items())
    if others:
        first["beside"] = others
    else:
        del first["name"]
    try:
        write_json(picture.with_suffix(".json"), first)
        return save_probe(contents, picture)
    except OSError as error:
        raise CheckpointError(f"cannot write the measurements: {error}") from error
