"""How far generated samples are from real ones, as functions of features; the Fréchet distance is in `frechet`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1000
"""Rows of a matrix of distances or kernel values that are there at once."""
NEIGHBOURS = 3
"""Of precision and recall: Kynkäänniemi et al. 2019, and ADM's suite."""
SPLITS = 10
"""Of the Inception Score: Salimans et al. 2016."""
LEVEL = 0.95
"""Of intervals."""


@dataclass(frozen=True)
class Estimate:
    """A number, and an interval of `LEVEL` about it.

    Attributes:
        value: of all samples.
        low, high: from resamples.
    """

    value: float
    low: float
    high: float


def around(value: float, resampled: Tensor) -> Estimate:
    """An estimate by the values (B,) of B resamples.

    A resample has fewer different samples, which biases distances upwards. So the spread of the values is taken about
    their own mean, and moved to the value of all samples. Without resamples the interval is NaN.
    """
    if not len(resampled):
        return Estimate(value, math.nan, math.nan)
    tail = (1 - LEVEL) / 2
    low, high = (resampled - resampled.mean()).quantile(torch.tensor([tail, 1 - tail], dtype=resampled.dtype)).tolist()
    return Estimate(value, value + low, value + high)


def resamples(count: int, times: int, generator: torch.Generator) -> list[Tensor]:
    """`times` draws of `count` numbers below `count`, with replacement (Efron 1979): int64 (count,) each."""
    return [torch.randint(count, (count,), generator=generator) for _ in range(times)]


def bootstrap(measure: Callable[..., float], sets: Sequence[Tensor], times: int) -> Estimate:
    """What `measure` gives of sets of samples (N, ...), with the interval of resamples of each set.

    Args:
        measure: of tensors like `sets`.
        sets: independent of each other.
        times: resamples; the same ones always.
    """
    generator = torch.Generator().manual_seed(0)
    draws = zip(*(resamples(len(own), times, generator) for own in sets), strict=True)
    values = [measure(*(own[index] for own, index in zip(sets, draw, strict=True))) for draw in draws]
    return around(measure(*sets), torch.tensor(values, dtype=torch.float64))


def kernel_distance(first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """KID (Bińkowski et al. 2018, arXiv:1801.01401): the unbiased estimate of MMD² by the kernel (x·y / F + 1)³.

    Of all samples. The reference implementations average it over random subsets, whose mean over every subset is this.

    Args:
        first: features (N, F), N at least 2.
        second: features (M, F), M at least 2.
        weights: how often each sample counts, in B resamples: (B, N) and (B, M). A sample is never paired with itself.

    Returns:
        fp64 (B,); (1,) without weights.
    """
    first, second = first.double(), second.double()
    if weights is None:
        weights = first.new_ones(1, len(first)), first.new_ones(1, len(second))
    one, other = (own.double() for own in weights)
    both = _weighted(first, second, one, other) / (one.sum(1) * other.sum(1))
    return _within(first, one) + _within(second, other) - 2 * both


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _weighted(first: Tensor, second: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The kernel of all pairs, summed with their weights (B, N) and (B, M): (B,)."""
    total = one.new_zeros(len(one))
    for rows, own in zip(first.split(_CHUNK), one.split(_CHUNK, 1), strict=True):
        total += (own * (other @ _kernel(second, rows))).sum(1)
    return total


def _within(features: Tensor, weights: Tensor) -> Tensor:
    """The mean over pairs of different samples."""
    own = (features.square().sum(1) / features.shape[1] + 1) ** 3
    squares = weights.square()
    return (_weighted(features, features, weights, weights) - squares @ own) / (weights.sum(1) ** 2 - squares.sum(1))


def kernel_estimate(first: Tensor, second: Tensor, times: int) -> Estimate:
    """`kernel_distance`, with the interval of resamples of both sets."""
    value = float(kernel_distance(first, second))
    if not times:
        return around(value, torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.stack([torch.bincount(draw, minlength=len(own)) for draw in resamples(len(own), times, generator)])
        for own in (first, second)
    ]
    return around(value, kernel_distance(first, second, (weights[0], weights[1])))


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991) are the means of what this returns.

    A set covers a sample that is no further from one of its own than the k-th nearest of the others is.

    Args:
        real: features (N, F), N above `neighbours`.
        generated: features (M, F), M above `neighbours`.
        neighbours: k.

    Returns:
        bool (M,), whether the real samples cover a generated one, and bool (N,), the other way round.
    """
    real, generated = real.double(), generated.double()
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(samples: Tensor, by: Tensor, neighbours: int) -> Tensor:
    # The nearest of a set to one of its own is that one itself.
    radii = torch.cat([torch.cdist(rows, by).kthvalue(neighbours + 1).values for rows in by.split(_CHUNK)])
    return torch.cat([(torch.cdist(rows, by) <= radii).any(1) for rows in samples.split(_CHUNK)])


def inception_score(logits: Tensor, splits: int = SPLITS) -> float:
    """exp(E KL(p(y|x) ‖ p(y))) (Salimans et al. 2016, arXiv:1606.03498), the mean over consecutive parts.

    Args:
        logits: of a classifier (N, K), of samples in random order, N at least `splits`.
        splits: parts; each has a p(y) of its own.
    """
    logs = logits.double().log_softmax(1)
    edges = [i * len(logs) // splits for i in range(splits + 1)]
    scores = []
    for start, stop in itertools.pairwise(edges):
        part = logs[start:stop]
        marginal = part.logsumexp(0) - math.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def posterior_divergence(real: Tensor, real_labels: Tensor, generated: Tensor, labels: Tensor) -> float:
    """KL(real ‖ generated) of the mean posteriors of each class, averaged over the classes that both have.

    Args:
        real: posteriors (N, K), all above 0.
        real_labels: int64 (N,).
        generated: posteriors (M, K), all above 0.
        labels: int64 (M,), the classes that were asked for.
    """
    found = []
    for label in real_labels.unique().tolist():
        if (labels == label).any():
            p, q = real[real_labels == label].double().mean(0), generated[labels == label].double().mean(0)
            found.append((p * (p.log() - q.log())).sum())
    return float(torch.stack(found).mean()) if found else math.nan


def diversity(features: Tensor, pairs: int = 200) -> float:
    """The mean distance of random pairs of features (N, F) (Guo et al. 2020, "Action2Motion", arXiv:2007.15240)."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(len(features), (2, pairs), generator=generator)
    return float((features[first].double() - features[second].double()).norm(dim=1).mean())


def multimodality(features: Tensor, labels: Tensor, pairs: int = 20) -> float:
    """`diversity` within each class, averaged over the classes of `labels` (N,) that have two samples or more."""
    counts = torch.bincount(labels)
    own = [diversity(features[labels == label], pairs) for label in (counts > 1).nonzero().flatten().tolist()]
    return sum(own) / len(own) if own else math.nan


def retrieved(logits: Tensor, labels: Tensor, top: int) -> Tensor:
    """Whether the class that was asked for, int64 (N,), is among the `top` of a classifier's logits (N, K): bool (N,).

    Its mean is R-precision (Guo et al. 2022, HumanML3D) with all classes as candidates.
    """
    return (logits.topk(min(top, logits.shape[1])).indices == labels[:, None]).any(1)
