"""Measures the blocks of a trained SiT, to choose a pair for LayerSync: what each knows, and how alike they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ..errors import CheckpointError, ConfigError, DataError
from ..losses import default_pair
from .build import build_transport, resolve_device, resolve_precision
from .checkpoint import atomic_path, find_weights, run_of
from .config import DataConfig, TransportConfig
from .data import SampleSet, load_data
from .model import SiT
from .paths import Path as Interpolant
from .plots import save_probe
from .runlog import console
from .sample import load_trained

PICTURE = "probe.png"
_PENALTIES = tuple(10.0**exponent for exponent in range(-4, 3))
_MIN_SAMPLES = 8
_MIN_PER_CLASS = 10
_CLEAR = 2.0
"""A difference counts from this many of its standard errors on."""


@dataclass(frozen=True)
class ProbeCommand:
    """Measure each block of a trained model and propose a (student, teacher) pair. Writes probe.png and probe.json."""

    source: tyro.conf.Positional[Path]
    """A run, a checkpoint folder, a .safetensors file or a published .pt."""
    out: Path | None = None
    """The picture; default: probe.png in the run, or beside the file. The numbers go beside it, as .json."""
    samples: int = 2000
    """How many samples to take; half of them train the probes, the other half is held out."""
    times: tuple[float, ...] = (0.5, 0.7, 0.9)
    """Noise levels of the inputs: 0 is noise, 1 is data."""
    batch_size: int = 64
    """Samples in one forward pass."""
    seed: int = 0
    """Fixes which samples are taken, and their noise."""
    data: DataConfig = field(default_factory=DataConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights or the last ones."""
    num_heads: int | None = None
    """Attention heads, for a lone file of unusual size: weights do not tell them."""
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        for flag, value, low in (("samples", self.samples, _MIN_SAMPLES), ("batch-size", self.batch_size, 1)):
            if value < low:
                raise ConfigError(f"--{flag} {value}: expected at least {low}")
        if not self.times or not all(0 <= t <= 1 for t in self.times):
            raise ConfigError(f"--times {' '.join(map(str, self.times))}: expected numbers from 0 (noise) to 1 (data)")
        if self.out is not None and self.out.suffix.lower() != ".png":
            raise ConfigError(f"--out {self.out}: expected a .png")


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


@dataclass(frozen=True)
class Accuracy:
    """Linear probes of the labels; all lists run over the blocks.

    Attributes:
        mean: share of held-out samples whose label is found, averaged over the times.
        standard_error: of `mean`, over held-out samples.
        per_time: the same at each time.
        chance: what naming the commonest label would reach.
    """

    mean: list[float]
    standard_error: list[float]
    per_time: list[list[float]]
    chance: float


@dataclass(frozen=True)
class Report:
    """The content of ``probe.json``.

    Attributes:
        checkpoint: what was measured.
        depth: number of blocks; everything per block is in their order.
        samples: how many were measured.
        held_out: how many of them the probes did not see.
        times: noise levels.
        accuracy: None where the data has no labels.
        cosine: (depth, depth), see `States`.
        cka: (depth, depth), see `linear_cka`; averaged over the times.
        pair: the proposed student and teacher, counted from 1.
        reason: why this pair.
        notes: what to bear in mind.
    """

    checkpoint: str
    depth: int
    samples: int
    held_out: int
    times: list[float]
    accuracy: Accuracy | None
    cosine: list[list[float]]
    cka: list[list[float]]
    pair: tuple[int, int]
    reason: str
    notes: list[str]


def linear_cka(features: Tensor) -> Tensor:
    """Linear centred kernel alignment of every two of L representations (Kornblith et al. 2019, arXiv:1905.00414).

    |Y'X|² / (|X'X|·|Y'Y|) of the centred features: 1 for equal ones, whatever their rotation and scale. It is biased
    upwards where there are not many more samples than channels. 0 with a representation that is constant.

    Args:
        features: (L, N, D).

    Returns:
        fp64 (L, L).
    """
    centred = features.double()
    centred = centred - centred.mean(1, keepdim=True)
    count = len(centred)
    cross = centred.new_zeros(count, count)
    for i in range(count):
        for j in range(i, count):
            cross[i, j] = cross[j, i] = (centred[j].T @ centred[i]).square().sum()
    norm = cross.diagonal().sqrt()
    return cross / (norm[:, None] * norm).clamp_min(torch.finfo(cross.dtype).tiny)


def linear_probe(features: Tensor, labels: Tensor, train: int) -> Tensor:
    """Whether a linear classifier, fitted to the first `train` samples, finds the labels of the others.

    Ridge regression of the centred one-hot labels on standardised features, in closed form and fp64. Its penalty is the
    one with the least square error on the last quarter of the training samples, when fitted to the rest of them.

    Args:
        features: (N, D).
        labels: int64 (N,).
        train: how many samples to fit.

    Returns:
        bool (N - train,).
    """
    features, targets = features.double(), F.one_hot(labels).double()
    fitted = train * 3 // 4
    errors = [
        (prediction - targets[fitted:train]).square().sum()
        for prediction in _ridge(features[:train], targets[:fitted], _PENALTIES)
    ]
    penalty = _PENALTIES[int(torch.stack(errors).argmin())]
    (prediction,) = _ridge(features, targets[:train], (penalty,))
    return prediction.argmax(1) == labels[train:]


def _ridge(features: Tensor, targets: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """For each penalty, what a fit of the targets (M, K) to the first M features says about the others."""
    count = len(targets)
    mean, std = features[:count].mean(0), features[:count].std(0)
    x = (features - mean) / std.clamp_min(1e-12)
    seen, unseen, offset = x[:count], x[count:], targets.mean(0)
    eigenvalues, basis = torch.linalg.eigh(seen.T @ seen / count)  # one factorisation serves every penalty
    moments = basis.T @ (seen.T @ (targets - offset)) / count
    rotated = unseen @ basis
    return [rotated @ (moments / (eigenvalues + penalty)[:, None]) + offset for penalty in penalties]


def teacher_range(depth: int) -> range:
    """The blocks that `propose_pair` lets teach: none of the last fifth (but at depth 2), and none so early that its
    student, at half its depth, would be less than a quarter of the model away.
    """
    return range(2 * -(-depth // 4), max(2, 4 * depth // 5) + 1)


def propose_pair(depth: int, scores: Tensor | None) -> tuple[tuple[int, int], str]:
    """A (student, teacher) pair and the reason for it.

    The teacher is the block of `teacher_range` whose probe is best, if it beats the teacher of `default_pair` by more
    than two standard errors of the difference, sample by sample. The student then lies at half the teacher's depth,
    rounded up, as in the published pairs to within one block (8:16, 8:18, 9:17): never in the first fifth of a model of
    6 blocks or more. Else, and without labels, it is the default pair.

    Args:
        depth: number of blocks, at least 2.
        scores: (depth, M), how well each block's probe does on each of M held-out samples; None without labels.
    """
    default = default_pair(depth)
    if scores is None:
        return default, f"without labels nothing tells the blocks apart: the default pair for depth {depth}"
    candidates = teacher_range(depth)
    means = scores.double().mean(1)
    best = max(candidates, key=lambda block: float(means[block - 1]))
    if len(candidates) == 1:
        choice = f"block {best} is the only one that may teach at depth {depth}"
    else:
        choice = f"block {best} has the best probe of those that may teach ({candidates[0]} to {candidates[-1]})"
    if best == default[1]:
        return default, f"{choice}, and it is the default pair's teacher"
    gain, error = _difference(scores, best, default[1])
    choice += f", {100 * gain:.1f} ± {100 * error:.1f} points above the default pair's teacher, block {default[1]}"
    if gain <= _CLEAR * error:
        return default, f"the probes do not separate the blocks, so the default pair: {choice}"
    return (-(-best // 2), best), f"{choice}; the student is at half its depth"


def _difference(scores: Tensor, first: int, second: int) -> tuple[float, float]:
    """By how much one block's probe is better than another's, and the standard error: both saw the same samples."""
    difference = scores[first - 1].double() - scores[second - 1].double()
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


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
    label = model.num_classes if model.y_embedder.dropout_prob > 0 else 0
    noise = torch.randn(count, *data.shape, generator=torch.Generator().manual_seed(seed))
    pieces: list[list[Tensor]] = [[] for _ in times]
    labels: list[Tensor] = []
    cosine, tokens = torch.zeros(depth, depth, dtype=torch.float64), 0
    starts = range(0, count, batch_size)
    batches = zip(starts, data.batches(batch_size, seed=seed), strict=False)  # the stream has no end
    quiet = not console.is_terminal
    for start, (x1, y) in track(batches, "measuring", len(starts), console=console, transient=True, disable=quiet):
        x0 = noise[start : start + batch_size].to(device)
        x1 = x1[: len(x0)].to(device)  # the last batch reaches into the next epoch
        labels.append(y[: len(x0)].cpu())
        y = torch.full((len(x0),), label, device=device)
        for piece, time in zip(pieces, times, strict=True):
            t = torch.full((len(x0),), time, device=device)
            x_t, _ = interpolant.interpolate(t.view(-1, 1, 1, 1), x0, x1)
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                _, states = model(x_t, t, y, capture=blocks)
            hidden = torch.stack([states[block].float() for block in blocks])
            piece.append(hidden.mean(2).cpu())
            unit = F.normalize(hidden, dim=-1, eps=1e-6).flatten(1, 2).transpose(0, 1)
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
        lead, error = _difference(scores, *pair)
        if lead > _CLEAR * error:
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


def print_report(report: Report) -> None:
    """Shows the table, the proposal and the notes on the terminal."""
    student, teacher = report.pair
    table = Table("block", "probe, %", f"cosine to {teacher}", f"CKA to {teacher}", "")
    for i in range(report.depth):
        probe = "-"
        if report.accuracy is not None:
            probe = f"{100 * report.accuracy.mean[i]:.1f} ± {100 * report.accuracy.standard_error[i]:.1f}"
        role = {student: "student", teacher: "teacher"}.get(i + 1, "")
        alike = (f"{matrix[i][teacher - 1]:.3f}" for matrix in (report.cosine, report.cka))
        table.add_row(str(i + 1), probe, *alike, role)
    console.print(table)
    if report.accuracy is not None:
        console.print(
            f"probe: mean over t = {', '.join(map(str, report.times))} and {report.held_out} held-out samples; "
            f"chance {100 * report.accuracy.chance:.1f} %"
        )
    console.print(f"proposed: --layersync {student}:{teacher} ({report.reason})")
    for note in report.notes:
        console.print(f"note: {note}")


def probe(command: ProbeCommand) -> Path:
    """Measures as `command` asks, prints, writes the picture and the numbers, and returns the path of the picture.

    Raises:
        UserError: anything wrong with the checkpoint, the data or the settings.
    """
    command.validate()
    device = resolve_device(command.device)
    trained = load_trained(command.source, ema=command.weights == "ema", num_heads=command.num_heads)
    depth = trained.model.depth
    if depth < 2:
        raise ConfigError(f"{command.source} has {depth} block; a pair needs a model of at least 2")
    try:
        data = load_data(command.data, device)
    except DataError as error:
        raise DataError(f"{error}; give the data to probe with by --data") from error
    if data.shape != trained.shape:
        raise DataError(
            f"--data {command.data.data} has samples of {data.shape}, the model was trained on {trained.shape}; "
            "give other --data, --image-size or --channels"
        )
    if len(data) < _MIN_SAMPLES:
        raise DataError(f"--data {command.data.data} has {len(data)} samples; expected at least {_MIN_SAMPLES}")
    states = measure(
        trained.model.to(device),
        build_transport(command.transport).path,
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
        null_label=trained.model.y_embedder.dropout_prob > 0,
        checkpoint=str(find_weights(command.source)),
    )
    print_report(report)
    run = run_of(command.source)
    picture = command.out or (run / PICTURE if run else command.source.with_name(f"{command.source.stem}-{PICTURE}"))
    content = dataclasses.asdict(report)
    try:
        with atomic_path(picture.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return save_probe(content, picture)
    except OSError as error:
        raise CheckpointError(f"cannot write the measurements: {error}") from error
