"""`layersync sample`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ..checkpoints.local import run_of
from ..config import at_least, require
from ..config.parallel import ParallelConfig
from ..config.run import SAMPLES, OfRun
from ..config.sampling import SamplingConfig, TransportConfig
from ..console import start_logging
from ..device import resolve_device, resolve_precision
from ..diffusion.transport import build_transport
from ..distributed.processes import ALONE, Processes, joined
from ..files import save_arrays
from ..modality.base import cut
from ..modality.latents import Latents
from ..sampling.draw import conditions
from ..sampling.load import Trained, load_trained
from ..sampling.many import Drawing, draw_many, writing_samples
from ..text.registry import load_text_encoder
from .arguments import parse_of_run


@dataclass(frozen=True)
class SampleCommand(OfRun):
    """Draw samples with the averaged weights: an overview, a row for each class, or with --number any number of them.

    What is written follows from what the model was trained on: pictures, sounds, films or stick figures. Processes that
    torchrun starts share the work: the files of --number, or the samples of the overview.
    """

    out: Path | None = None
    """Of the overview: its file, the suffix aside; default: samples/grid in the run, or beside the file. With --number:
    the folder; default: samples/many."""
    classes: tuple[int, ...] = ()
    """Rows; default: the first ten, and with --number all."""
    captions: tuple[str, ...] = ()
    """Rows of a model that was trained with texts; default: some of its training data."""
    per_class: int = 8
    """Samples per row."""
    number: int | None = None
    """Write so many samples into numbered .npz files, all classes alike; called again, it goes on where it was."""
    shard: int = 1000
    """Samples in a file of --number."""
    files: bool = False
    """Also write each sample into a file of its own: PNG, wav, GIF, npz."""
    array: Path | None = None
    """Also write the samples into this .npz: images as ADM's evaluation suite reads them, uint8 (N, H, W, C) under
    "arr_0" and labels under "arr_1"; all else restored, under "samples" and "labels"."""
    floats: bool = False
    """In --array: the samples as the model gives them, "samples" float32 (N, C, ...), and "labels" int64 (N,)."""
    vae: str | None = None
    """Of a model of latents: decode what is drawn by this autoencoder of diffusers, a folder or a name of the hub."""
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    weights: str = "ema"
    """The averaged weights, or the last ones: ema | model | ema-DECAY of a run with several averages."""
    batch_size: int = 256
    """Samples drawn at once."""
    num_heads: int | None = None
    """Attention heads, for a lone file of unusual size: weights do not tell them."""
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    timeout: float = ParallelConfig.timeout
    """Seconds that a process waits for the others, where torchrun has started several."""


def sample(command: SampleCommand, *, processes: Processes = ALONE, device: torch.device | None = None) -> Path:
    """Draws what `command` asks for and returns the path of the picture, or of the folder.

    Args:
        command: what.
        processes: that share the work.
        device: of this one; None: what the command says.

    Raises:
        UserError: anything wrong with the checkpoint or the settings.
    """
    command.sampling.validate()
    at_least(1, per_class=command.per_class, batch_size=command.batch_size, number=command.number, shard=command.shard)
    at_least(0, seed=command.seed)
    require(command.array is not None or not command.floats, "--floats says what --array holds: give that too")
    device = resolve_device(command.device) if device is None else device
    trained = load_trained(command.source, which=command.weights, num_heads=command.num_heads)
    if command.vae is not None:
        if not isinstance(trained.modality, Latents):
            raise ConfigError(f"--vae {command.vae}: the model draws {trained.modality.kind}, which need no decoding")
        trained.modality = trained.modality.decoded_by(command.vae)
    classes = _classes(command, trained)
    text, text_lengths = _words(command, trained)
    rows = len(classes) if text is None else len(text)
    if command.number is None:
        which = torch.arange(rows).repeat_interleave(command.per_class)
    else:
        which = torch.arange(command.number) % rows
    labels = torch.tensor(classes)[which] if text is None else torch.zeros_like(which)
    condition = conditions(labels, trained.lengths, text, text_lengths, which)
    drawing = Drawing(
        trained.model.to(device),
        build_transport(command.transport),
        command.sampling,
        seed=command.seed,
        autocast_dtype=resolve_precision(command.precision, device),
        batch_size=command.batch_size,
    )
    run = run_of(command.source)
    default = run / SAMPLES if run else command.source.parent
    if command.number is not None:
        folder = command.out or default / "many"
        draw_many(
            drawing,
            trained,
            condition,
            folder,
            shard=command.shard,
            files=command.files,
            device=device,
            processes=processes,
        )
        return folder
    samples = drawing(condition.to(device), processes=processes)
    if not samples.isfinite().all():
        raise CheckpointError(f"{command.source} gives samples that are not finite; its weights may have diverged")

    def write() -> str:
        stem = (command.out or default / ("grid" if run else command.source.name)).with_suffix("")
        with writing_samples():
            if command.array is not None:
                given = {"samples": samples.cpu().numpy(), "labels": labels.numpy()}
                save_arrays(command.array, given if command.floats else trained.arrays(samples, condition))
            drawn = trained.modality.overview(samples, stem, columns=command.per_class, lengths=condition.lengths)
            if command.files:
                for i, own in enumerate(cut(samples, condition.lengths)):
                    trained.modality.save(own, stem / f"{i:06d}")
        return os.fspath(drawn[0])

    return Path(processes.by_first(write))


def _classes(command: SampleCommand, trained: Trained) -> tuple[int, ...]:
    shown = trained.num_classes if command.number is not None else min(10, trained.num_classes)
    classes = command.classes or tuple(range(shown))
    require(
        all(0 <= c < trained.num_classes for c in classes),
        f"--classes {' '.join(map(str, classes))}: the model has classes 0 to {trained.num_classes - 1}",
    )
    return classes


def _words(command: SampleCommand, trained: Trained) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings of the captions, and how many words each has; None: no texts."""
    if trained.text_encoder is None:
        if command.captions:
            raise ConfigError("--captions: the model was not trained with texts; give --classes")
        return None, None
    if command.classes:
        raise ConfigError("--classes: the model was trained with texts; give --captions")
    captions = command.captions or trained.captions[: 10 if command.number is None else None]
    if not captions:
        raise ConfigError("the run kept no captions; give --captions")
    return load_text_encoder(trained.text_encoder).encode(captions)


def sample_main(argv: Sequence[str]) -> int:
    """`layersync sample`."""
    start_logging()
    command = parse_of_run(SampleCommand, argv, command="sample")
    at_least(1, timeout=command.timeout)
    with joined(command.device, timeout=command.timeout) as (processes, device):
        path = sample(command, processes=processes, device=device)
        if processes.first:
            print(path)
    return 0
