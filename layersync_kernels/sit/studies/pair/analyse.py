"""From what was measured to a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import CheckpointError
from ...evaluation.probes import linear_cka, linear_cka_to, linear_probe, neighbour_probe
from .measure import States
from .report import (
    CLEAR,
    Accuracy,
    Neighbours,
    Report,
    TeacherLikeness,
    cosine_note,
    noised,
    paired_difference,
    propose_pair,
)
from .teacher import TeacherFeatures

_MIN_PER_CLASS = 10
"""Training samples of a class below which a probe is said to have few."""
_NEIGHBOURS = 20
"""How many vote, where the classes have as many samples."""


def analyse(
    states: States,
    *,
    times: Sequence[float],
    null_label: bool,
    checkpoint: str,
    teacher: TeacherFeatures | None = None,
) -> Report:
    """Probes what `measure` saw and proposes a pair, by the noised inputs; by clean ones where there are no others.

    Args:
        states: what it saw.
        times: those of `states`.
        null_label: whether the model has one.
        checkpoint: what was measured, for the report and for messages.
        teacher: what a pretrained network knows of the same samples.

    Raises:
        CheckpointError: the model puts out NaN or infinity; says where.
    """
    _check_finite(states, times, checkpoint)
    depth, count = states.features.shape[1:3]
    train, classes = count // 2, len(states.labels.unique())
    accuracy, neighbours, scores, notes = None, None, None, []
    at_noise = noised(times)
    if classes < 2:
        notes.append("the data has no labels, or one class only: no linear probe and no neighbours, similarities alone")
    else:
        if not null_label:
            notes.append("the model has no null label: it was told class 0 for every sample, which costs accuracy")
        if train < _MIN_PER_CLASS * classes:
            wanted = 2 * _MIN_PER_CLASS * classes
            notes.append(f"{train} samples for probes of {classes} classes are few; better --samples {wanted} or more")
        every = [list(blocks) for blocks in states.features]
        correct = torch.stack([torch.stack([linear_probe(own, states.labels, train) for own in b]) for b in every])
        scores = correct[at_noise].double().mean(0)
        accuracy = Accuracy(**_shares(correct, at_noise, states.labels, train))
        voters = min(_NEIGHBOURS, max(1, train // classes))
        named = torch.stack(
            [torch.stack([neighbour_probe(own, states.labels, train, voters) for own in b]) for b in every]
        )
        neighbours = Neighbours(**_shares(named, at_noise, states.labels, train), neighbours=voters)
    pair, reason = propose_pair(depth, scores)
    if scores is not None:
        lead, error = paired_difference(scores, *pair)
        if lead > CLEAR * error:
            notes.append(
                f"the student, block {pair[0]}, probes better than the teacher, block {pair[1]}, by {100 * lead:.1f} ± "
                f"{100 * error:.1f} points: on this run the labels speak against the pair"
            )
    cosine, cka = states.cosine, torch.stack([linear_cka(blocks) for blocks in states.features])
    mean_cosine = cosine[at_noise].mean(0).tolist()
    if (alike := cosine_note(pair, mean_cosine)) is not None:
        notes.append(alike)
    likeness = None
    if teacher is not None:
        own = [linear_cka_to(blocks, teacher.features).tolist() for blocks in states.features]
        likeness = TeacherLikeness(teacher.name, own)
    return Report(
        checkpoint=checkpoint,
        depth=depth,
        samples=count,
        held_out=count - train,
        times=list(times),
        accuracy=accuracy,
        neighbours=neighbours,
        effective_rank=states.effective_rank.tolist(),
        cosine=mean_cosine,
        cosine_per_time=cosine.tolist(),
        cka=cka[at_noise].mean(0).tolist(),
        cka_per_time=cka.tolist(),
        teacher=likeness,
        pair=pair,
        reason=reason,
        notes=notes,
    )


def _shares(correct: Tensor, at_noise: list[int], labels: Tensor, train: int) -> dict[str, Any]:
    """The fields of `Accuracy`, of bool (times, depth, M)."""
    scores = correct.double()[at_noise].mean(0)
    commonest = labels[:train].mode().values
    return {
        "mean": scores.mean(1).tolist(),
        "standard_error": (scores.std(1) / scores.shape[1] ** 0.5).tolist(),
        "per_time": correct.double().mean(2).tolist(),
        "chance": float((labels[train:] == commonest).double().mean()),
    }


def _check_finite(states: States, times: Sequence[float], checkpoint: str) -> None:
    bad = ~states.features.isfinite().all(-1)
    if not bad.any():
        return
    time, block, _ = bad.nonzero()[0].tolist()
    raise CheckpointError(
        f"{checkpoint}: the output of block {block + 1} is not finite (NaN or infinity) for "
        f"{int(bad[time, block].sum())} of {bad.shape[2]} samples at t = {times[time]:g}; its weights may have "
        "diverged: take an earlier checkpoint"
    )
