"""What is measured of each kind of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .frechet import RealFeatures
from .metrics import (
    Estimate,
    bootstrap,
    diversity,
    inception_score,
    kernel_estimate,
    multimodality,
    posterior_divergence,
    precision_recall,
    retrieved,
)
from .networks import I3D, INCEPTION, Seen

TOPS = (1, 2, 3)
"""Of R-precision."""
_LEAST_POSTERIOR = 1e-3


@dataclass(frozen=True)
class Group:
    """Samples as a network sees them.

    Attributes:
        seen: N of them.
        labels: int64 (N,), their classes, or those that were asked for; None: not known.
    """

    seen: Seen
    labels: Tensor | None


Measured = dict[str, "Estimate | str"]
"""By name a number, or why there is none."""


def posteriors(scores: Tensor) -> Tensor:
    """Scores of `linear_scores` (N, K) as logarithms of posteriors: cut to [0.001, 1], and of sum 1."""
    cut = scores.clamp(_LEAST_POSTERIOR, 1)
    return (cut / cut.sum(1, keepdim=True)).log()


def distance_names(kind: str, network: str) -> dict[str, str]:
    """Sets of features of which a Fréchet distance is taken, with what it is called there."""
    if kind == "images":
        return {"features": "FID", "spatial": "sFID"} if network == INCEPTION else {"features": "FD", "spatial": "sFD"}
    if kind == "video":
        return {"features": "FVD"} if network == I3D else {"features": "FD", "changes": "FD of changes"}
    return {"features": "FD" if kind == "motion" else "FAD"}


def measure(kind: str, network: str, real: Group, given: Group, *, times: int, directions: int | None) -> Measured:
    """All that is measured of `given` samples, against real ones.

    Args:
        kind: of the samples: images, audio, motion or video.
        network: the name of what sees them.
        real: what they are compared with.
        given: the samples.
        times: resamples behind intervals; 0: none.
        directions: principal directions in which Fréchet distances are taken; None: all dimensions.
    """
    found: Measured = {}
    for key, name in distance_names(kind, network).items():
        reference = RealFeatures(real.seen.sets[key], directions)
        refused = reference.refusal(len(given.seen))
        found[name] = refused or reference.estimate(given.seen.sets[key], times)
    found["KID"] = kernel_estimate(given.seen.features, real.seen.features, times)
    for name, share in zip(
        ("precision", "recall"), precision_recall(real.seen.features, given.seen.features), strict=True
    ):
        found[name] = _share(share, times)
    found.update(_OTHERS[kind](real, given, times))
    return {name: own for name, own in found.items() if isinstance(own, str) or not math.isnan(own.value)}


def _share(right: Tensor, times: int) -> Estimate:
    return bootstrap(lambda own: float(own.mean()), (right.double(),), times)


def _images(real: Group, given: Group, times: int) -> Iterator[tuple[str, Estimate]]:
    if given.seen.logits is not None:
        order = torch.randperm(len(given.seen), generator=torch.Generator().manual_seed(0))
        yield "IS", bootstrap(inception_score, (given.seen.logits[order],), times)


def _audio(real: Group, given: Group, times: int) -> Iterator[tuple[str, Estimate]]:
    if given.labels is None or real.labels is None or given.seen.logits is None or real.seen.logits is None:
        return
    labels, asked = real.labels, given.labels
    sets = _with_labels(real.seen.logits, labels), _with_labels(given.seen.logits, asked)

    def divergence(own: Tensor, other: Tensor) -> float:
        return posterior_divergence(own[:, 1:].exp(), own[:, 0].long(), other[:, 1:].exp(), other[:, 0].long())

    yield "KL of posteriors", bootstrap(divergence, sets, times)
    yield "recognised", _share(retrieved(given.seen.logits, asked, 1), times)


def _with_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Labels (N,) in front of values (N, F): what is resampled together."""
    return torch.cat([labels[:, None].to(values.dtype), values], 1)


def _motion(real: Group, given: Group, times: int) -> Iterator[tuple[str, Estimate]]:
    yield "diversity", bootstrap(diversity, (given.seen.features,), times)
    if given.labels is None or given.seen.logits is None:
        return
    own = _with_labels(given.seen.features, given.labels)
    yield "multimodality", bootstrap(lambda rows: multimodality(rows[:, 1:], rows[:, 0].long()), (own,), times)
    for top in TOPS:
        yield f"R-precision@{top}", _share(retrieved(given.seen.logits, given.labels, top), times)


def _video(real: Group, given: Group, times: int) -> Iterator[tuple[str, Estimate]]:
    yield from ()


_OTHERS: dict[str, Callable[[Group, Group, int], Iterator[tuple[str, Estimate]]]] = {
    "images": _images,
    "audio": _audio,
    "motion": _motion,
    "video": _video,
}
