"""What features know: linear probes, nearest neighbours; how alike they are (CKA), how many dimensions they fill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_PENALTIES = tuple(10.0**exponent for exponent in range(-4, 3))
_TEMPERATURE = 0.07
_QUERIES = 1024
"""Samples whose neighbours are looked for at a time."""


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


def linear_cka_to(features: Tensor, other: Tensor) -> Tensor:
    """`linear_cka` of each of L representations with one more, which may be of another width.

    Args:
        features: (L, N, D).
        other: (N, W), of the same samples.

    Returns:
        fp64 (L,).
    """
    centred = features.double() - features.double().mean(1, keepdim=True)
    target = other.double() - other.double().mean(0)
    own = torch.stack([(block.T @ block).square().sum() for block in centred])
    cross = torch.stack([(target.T @ block).square().sum() for block in centred])
    norm = (own * (target.T @ target).square().sum()).sqrt()
    return cross / norm.clamp_min(torch.finfo(cross.dtype).tiny)


def effective_rank(covariance: Tensor) -> Tensor:
    """How many dimensions are filled: exp of the entropy of the eigenvalues over their sum (Roy & Vetterli 2007, "The
    effective rank: a measure of effective dimensionality").

    D where all directions have the same variance, 1 where one has all of it or there is none; NaN where the covariance
    is not finite.

    Args:
        covariance: (..., D, D).

    Returns:
        fp64 (...).
    """
    finite = covariance.isfinite().all(-1).all(-1)
    values = torch.linalg.eigvalsh(covariance.double().where(finite[..., None, None], 0.0)).clamp_min(0)
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp().where(finite, torch.nan)


def neighbour_probe(features: Tensor, labels: Tensor, train: int, neighbours: int = 20) -> Tensor:
    """Whether the nearest of the first `train` samples name the labels of the others: bool (N - train,).

    Neighbours vote with weight exp(cosine / 0.07) for their labels, as in Wu et al. 2018 (arXiv:1805.01978), whose
    protocol, with 20 neighbours, is that of DINO (Caron et al. 2021, arXiv:2104.14294).

    Args:
        features: (N, D).
        labels: int64 (N,).
        train: M.
        neighbours: how many vote, no more than there are.
    """
    unit, votes = F.normalize(features.double(), dim=1), []
    for queries in unit[train:].split(_QUERIES):
        cosine, index = (queries @ unit[:train].T).topk(min(neighbours, train))
        own = unit.new_zeros(len(queries), int(labels.max()) + 1)
        votes.append(own.scatter_add_(1, labels[:train][index], (cosine / _TEMPERATURE).exp()))
    return torch.cat(votes).argmax(1) == labels[train:]


def linear_probe(features: Tensor, labels: Tensor, train: int) -> Tensor:
    """Whether `linear_scores`, fitted to the first `train` samples, are highest for the labels of the others: bool
    (N - train,).
    """
    return linear_scores(features, labels[:train], int(labels.max()) + 1).argmax(1) == labels[train:]


def linear_scores(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """What a linear classifier, fitted to the first M samples, says of the others.

    Ridge regression of the centred one-hot labels on standardised features, in closed form and fp64. Its penalty is the
    one with the least square error on the last quarter of the training samples, when fitted to the rest of them.

    Args:
        features: (N, D).
        labels: int64 (M,), of the samples to fit.
        classes: K.

    Returns:
        fp64 (N - M, K); a row sums to 1, as posteriors do, yet may leave [0, 1].
    """
    features, targets = features.double(), F.one_hot(labels, classes).double()
    train = len(labels)
    fitted = train * 3 // 4
    errors = [
        (prediction - targets[fitted:]).square().sum()
        for prediction in _ridge(features[:train], targets[:fitted], _PENALTIES)
    ]
    penalty = _PENALTIES[int(torch.stack(errors).argmin())]
    (prediction,) = _ridge(features, targets, (penalty,))
    return prediction


def _ridge(features: Tensor, targets: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """For each penalty, what a fit of the targets (M, K) to the first M features says about the others."""
    count = len(targets)
    mean, std = features[:count].mean(0), features[:count].std(0)
    x = (features - mean) / std.clamp_min(1e-12)
    seen, unseen, offset = x[:count], x[count:], targets.mean(0)
    # One factorisation serves every penalty; of fewer samples than features, the directions that these span suffice.
    if count < seen.shape[1]:
        _, singular, rows = torch.linalg.svd(seen, full_matrices=False)
        eigenvalues, basis = singular.square() / count, rows.T
    else:
        eigenvalues, basis = torch.linalg.eigh(seen.T @ seen / count)
    moments = basis.T @ (seen.T @ (targets - offset)) / count
    rotated = unseen @ basis
    return [rotated @ (moments / (eigenvalues + penalty)[:, None]) + offset for penalty in penalties]
