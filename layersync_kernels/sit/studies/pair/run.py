"""Measures the blocks of a trained SiT, to choose a pair for LayerSync: what each knows, and how alike they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from ....errors import CheckpointError, ConfigError, DataError
from ....ops.attention import length_mask
from ...checkpoints.local import run_of
from ...checkpoints.weights import find_weights
from ...console import console
from ...data.base import SampleSet
from ...data.registry import load_data
from ...device import resolve_device, resolve_precision
from ...diffusion.interpolants import Interpolant, per_sample
from ...diffusion.transport import build_transport
from ...evaluation.probes import linear_cka, linear_probe
from ...files import write_json
from ...models.sit import SiT
from ...sampling.load import load_trained
from .config import MIN_SAMPLES, ProbeCommand
from .plots import save_probe
from .report import CLEAR, PICTURE, Accuracy, Report, paired_difference, print_report, propose_pair

_MIN_PER_CLASS = 10
"""Training samples of a class below which a probe is said to have few."""


@dataclass(frozen=True)
class States:
    """What `measure` saw.

    Attributes:
        features: fp32 (times, depth, N, D), on the CPU: each block's output, averaged over the tokens.
        labels: int64 (N,).
        cosine: (depth, depth), the mean cosine of equal tokens of two blocks, over samples and times: what LayerSync
            raises.
    """

    features: Tensor
    labels: Tensor
    cosine: Tensor


@torch.no_grad()
def measure(
    model: SiT,
    interpolant: Interpolant,
    data: SampleSet,
    *,
    samples: int,
    times: Sequence[float],
    batch_size: int,
    seed: int,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
) -> States:
    """Runs noised samples through the model and keeps what its blocks put out.

    The model is not told the labels: it gets the null label, or where it has none class 0 for every sample. The noise
    of a sample is the same at all times, and whatever the batch size.

    Args:
        model: in evaluation mode, on `device`.
        interpolant: the path that noises.
        data: where the samples come from, each at most once; no more than it has are taken.
        samples: how many.
        times: noise levels.
        batch_size: samples in one forward pass.
        seed: of the choice and of the noise.
        device: where the model is.
        autocast_dtype: None for fp32.
    """
    count, depth = min(samples, len(data)), model.depth
    blocks = tuple(range(1, depth + 1))
    noise = torch.randn(count, *data.spec.shape, generator=torch.Generator().manual_seed(seed))
    pieces: list[list[Tensor]] = [[] for _ in times]
    labels: list[Tensor] = []
    cosine, tokens = torch.zeros(depth, depth, dtype=torch.float64), 0
    starts = range(0, count, batch_size)
    batches = zip(starts, data.batches(batch_size, seed=seed), strict=False)  # the stream has no end
    quiet = not console.is_terminal
    for start, batch in track(batches, "measuring", len(starts), console=console, transient=True, disable=quiet):
        x0 = noise[start : start + batch_size].to(device)
        batch = batch[: len(x0)]  # the last one reaches into the next epoch
        labels.append(batch.labels.cpu())
        x1, given = batch.samples.to(device), batch.condition.to(device)
        free = (
            model.without(given)
            if model.guidable
            else dataclasses.replace(given, labels=torch.zeros_like(given.labels))
        )
        mask = None
        if given.lengths is not None:
            mask = length_mask(model.token_lengths(given.lengths), math.prod(model.grid))[None, ..., None]
        for piece, time in zip(pieces, times, strict=True):
            t = torch.full((len(x0),), time, device=device)
            x_t, _ = interpolant.interpolate(per_sample(t, x1), x0, x1)
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                _, states = model(x_t, t, **free.keywords(), capture=blocks)
            hidden = torch.stack([states[block].float() for block in blocks])
            unit = F.normalize(hidden, dim=-1, eps=1e-6)
            if mask is None:
                piece.append(hidden.mean(2).cpu())
                unit = unit.flatten(1, 2)
            else:
                piece.append((hidden * mask).sum(2).div(mask.sum(2)).cpu())
                unit = unit[:, mask[0, ..., 0]]
            unit = unit.transpose(0, 1)
            # Token by token: one product over all of them puts 5e-5 of rounding on a cosine of 1.
            cosine += (unit @ unit.mT).sum(0).cpu()
            tokens += len(unit)
    return States(torch.stack([torch.cat(piece, 1) for piece in pieces]), torch.cat(labels), cosine / tokens)


def analyse(states: States, *, times: Sequence[float], null_label: bool, checkpoint: str) -> Report:
    """Probes what `measure` saw and proposes a pair."""
    depth, count = states.features.shape[1:3]
    train, classes = count // 2, len(states.labels.unique())
    accuracy, scores, notes = None, None, []
    if classes < 2:
        notes.append("the data has one class only: no linear probe, similarities alone")
    else:
        if not null_label:
            notes.append("the model has no null label: it was told class 0 for every sample, which costs accuracy")
        if train < _MIN_PER_CLASS * classes:
            wanted = 2 * _MIN_PER_CLASS * classes
            notes.append(f"{train} samples for probes of {classes} classes are few; better --samples {wanted} or more")
        correct = torch.stack(
            [torch.stack([linear_probe(block, states.labels, train) for block in blocks]) for blocks in states.features]
        ).double()
        scores = correct.mean(0)
        commonest = states.labels[:train].mode().values
        accuracy = Accuracy(
            mean=scores.mean(1).tolist(),
            standard_error=(scores.std(1) / scores.shape[1] ** 0.5).tolist(),
            per_time=correct.mean(2).tolist(),
            chance=float((states.labels[train:] == commonest).double().mean()),
        )
    pair, reason = propose_pair(depth, scores)
    if scores is not None:
        lead, error = paired_difference(scores, *pair)
        if lead > CLEAR * error:
            notes.append(
                f"the student, block {pair[0]}, probes better than the teacher, block {pair[1]}, by {100 * lead:.1f} ± "
                f"{100 * error:.1f} points: on this run the labels speak against the pair"
            )
    return Report(
        checkpoint=checkpoint,
        depth=depth,
        samples=count,
        held_out=count - train,
        times=list(times),
        accuracy=accuracy,
        cosine=states.cosine.tolist(),
        cka=torch.stack([linear_cka(blocks) for blocks in states.features]).mean(0).tolist(),
        pair=pair,
        reason=reason,
        notes=notes,
    )


def probe(command: ProbeCommand) -> Path:
    """Measures as `command` asks, prints, writes the picture and the numbers, and returns the path of the picture.

    Raises:
        UserError: anything wrong with the checkpoint, the data or the settings.
    """
    command.validate()
    device = resolve_device(command.device)
    trained = load_trained(command.source, which=command.weights, num_heads=command.num_heads)
    depth = trained.model.depth
    if depth < 2:
        raise ConfigError(f"{command.source} has {depth} block; a pair needs a model of at least 2")
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
    states = measure(
        trained.model.to(device),
        build_transport(command.transport).interpolant,
        data,
        samples=command.samples,
        times=command.times,
        batch_size=command.batch_size,
        seed=command.seed,
        device=device,
        autocast_dtype=resolve_precision(command.precision, device),
    )
    if not states.features.isfinite().all():
        raise CheckpointError(f"{command.source} has blocks that are not finite; its weights may have diverged")
    report = analyse(
        states,
        times=command.times,
        null_label=trained.model.guidable,
        checkpoint=str(find_weights(command.source)),
    )
    print_report(report)
    run = run_of(command.source)
    picture = command.out or (run / PICTURE if run else command.source.with_name(f"{command.source.stem}-{PICTURE}"))
    content = dataclasses.asdict(report)
    try:
        write_json(picture.with_suffix(".json"), content)
        return save_probe(content, picture)
    except OSError as error:
        raise CheckpointError(f"cannot write the measurements: {error}") from error
