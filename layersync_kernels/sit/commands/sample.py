"""`layersync sample`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ...errors import CheckpointError, ConfigError
from ..checkpoints.local import run_of
from ..config.run import SAMPLES, OfRun
from ..config.sampling import SamplingConfig, TransportConfig
from ..console import start_logging
from ..device import resolve_device, resolve_precision
from ..diffusion.transport import build_transport
from ..files import atomic_path
from ..sampling.draw import conditions, draw
from ..sampling.load import load_trained
from .arguments import parse_of_run


@dataclass(frozen=True)
class SampleCommand(OfRun):
    """Draw a grid of samples, one row per class, with the averaged weights."""

    out: Path | None = None
    """The picture; default: samples/grid.png in the run, or beside the file."""
    classes: tuple[int, ...] = ()
    """Rows; default: the first ten."""
    per_class: int = 8
    """Samples per row."""
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights or the last ones."""
    array: Path | None = None
    """Also write the samples as .npz: "samples" float32 (N, C, H, W), "labels" int64 (N,)."""
    batch_size: int = 256
    """Samples drawn at once."""
    num_heads: int | None = None
    """Attention heads, for a lone file of unusual size: weights do not tell them."""
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


def sample(command: SampleCommand) -> Path:
    """Draws the grid that `command` asks for and returns the path of the picture.

    Raises:
        UserError: anything wrong with the checkpoint or the settings.
    """
    command.sampling.validate()
    device = resolve_device(command.device)
    trained = load_trained(command.source, ema=command.weights == "ema", num_heads=command.num_heads)
    classes = command.classes or tuple(range(min(10, trained.num_classes)))
    if not all(0 <= c < trained.num_classes for c in classes):
        raise ConfigError(
            f"--classes {' '.join(map(str, classes))}: the model has classes 0 to {trained.num_classes - 1}"
        )
    for flag, value in {"per-class": command.per_class, "batch-size": command.batch_size}.items():
        if value < 1:
            raise ConfigError(f"--{flag} {value}: expected at least 1")
    condition = conditions(torch.tensor(classes).repeat_interleave(command.per_class), trained.lengths)
    samples = draw(
        trained.model.to(device),
        build_transport(command.transport),
        command.sampling,
        condition.to(device),
        seed=command.seed,
        autocast_dtype=resolve_precision(command.precision, device),
        batch_size=command.batch_size,
    )
    if not samples.isfinite().all():
        raise CheckpointError(f"{command.source} gives samples that are not finite; its weights may have diverged")
    run = run_of(command.source)
    default = run / SAMPLES / "grid.png" if run else command.source.with_suffix(".png")
    try:
        if command.array is not None:
            with atomic_path(command.array) as temporary, temporary.open("wb") as file:
                np.savez(file, samples=samples.cpu().numpy(), labels=condition.labels.numpy())
        stem = (command.out or default).with_suffix("")
        columns, lengths = command.per_class, condition.lengths
        return trained.modality.overview(samples, stem, columns=columns, lengths=lengths)[0]
    except OSError as error:
        raise CheckpointError(f"cannot write the samples: {error}") from error


def sample_main(argv: Sequence[str]) -> int:
    """`layersync sample`."""
    start_logging()
    print(sample(parse_of_run(SampleCommand, argv, command="sample")))
    return 0
