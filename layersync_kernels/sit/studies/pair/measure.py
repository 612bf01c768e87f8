"""Runs samples through a SiT and keeps what its blocks put out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from ....ops.attention import length_mask
from ...batch import Batch, Condition
from ...console import console
from ...data.base import SampleSet
from ...diffusion.interpolants import Interpolant, per_sample
from ...evaluation.probes import effective_rank
from ...models.sit import SiT


@dataclass(frozen=True)
class States:
    """What `measure` saw.

    Attributes:
        features: fp32 (times, depth, N, D), on the CPU: each block's output, averaged over the tokens.
        labels: int64 (N,).
        cosine: fp64 (times, depth, depth), the mean cosine of equal tokens of two blocks, over samples: what LayerSync
            raises.
        effective_rank: fp64 (times, depth), of the covariance of all tokens of all samples, see `effective_rank`.
    """

    features: Tensor
    labels: Tensor
    cosine: Tensor
    effective_rank: Tensor


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
    progress: bool = False,
) -> States:
    """Runs samples through the model at each of the times and keeps what its blocks put out.

    The model is not told the labels: it gets the null label, or where it has none class 0 for every sample. The noise
    of a sample is the same at all times, and whatever the batch size. Padding counts for nothing. No global random
    numbers are drawn.

    Args:
        model: in evaluation mode, on `device`.
        interpolant: the path that noises.
        data: where the samples come from, each at most once; no more than it has are taken.
        samples: how many.
        times: noise levels; 0 is noise, 1 the clean sample.
        batch_size: samples in one forward pass.
        seed: of the choice and of the noise.
        device: where the model is.
        autocast_dtype: None for fp32.
        progress: show a bar on a terminal.
    """
    count, depth = min(samples, len(data)), model.depth
    blocks = tuple(range(1, depth + 1))
    noise = torch.randn(count, *data.spec.shape, generator=torch.Generator().manual_seed(seed))
    features: list[Tensor] = []
    labels: list[Tensor] = []
    cosines, ranks = [], []
    for turn, time in enumerate(times):  # outermost, so that there are the moments of one time only
        moments, pieces = _Moments(), []
        cosine = torch.zeros(depth, depth, dtype=torch.float64)
        for start, batch in first_batches(data, count, batch_size, seed, what=f"t = {time:g}" if progress else None):
            x0, x1 = noise[start : start + len(batch)].to(device), batch.samples.to(device)
            given = batch.condition.to(device)
            t = torch.full((len(batch),), time, device=device)
            x_t, _ = interpolant.interpolate(per_sample(t, x1), x0, x1)
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                _, states = model(x_t, t, **_untold(model, given).keywords(), capture=blocks)
            hidden = torch.stack([states[block].float() for block in blocks])
            there = tokens_there(model, given.lengths)
            pieces.append(mean_tokens(hidden, there).cpu())
            tokens = hidden.flatten(1, 2) if there is None else hidden[:, there]
            moments.add(tokens)
            unit = F.normalize(tokens, dim=-1, eps=1e-6).transpose(0, 1)
            # Token by token: one product over all of them puts 5e-5 of rounding on a cosine of 1.
            cosine += (unit @ unit.mT).sum(0).cpu()
            if turn == 0:
                labels.append(batch.labels.cpu())
        features.append(torch.cat(pieces, 1))
        cosines.append(cosine / moments.count)
        ranks.append(effective_rank(moments.covariance()).cpu())
    return States(torch.stack(features), torch.cat(labels), torch.stack(cosines), torch.stack(ranks))


def first_batches(
    data: SampleSet, count: int, batch_size: int, seed: int, *, what: str | None
) -> Iterator[tuple[int, Batch]]:
    """The first `count` samples of the shuffled stream of that seed, and where in it each batch begins.

    Args:
        data: has no fewer.
        count: of samples.
        batch_size: of each batch but the last.
        seed: of the stream.
        what: is being done, for a bar on a terminal; None: no bar.
    """
    starts = range(0, count, batch_size)
    batches = zip(starts, data.batches(batch_size, seed=seed), strict=False)  # the stream has no end
    quiet = what is None or not console.is_terminal
    for start, batch in track(batches, what or "", len(starts), console=console, transient=True, disable=quiet):
        yield start, batch[: count - start]  # the last one reaches into the next epoch


def tokens_there(model: SiT, lengths: Tensor | None) -> Tensor | None:
    """Which tokens of samples of these lengths (B,) are no padding: bool (B, N); None: all of them."""
    return None if lengths is None else length_mask(model.token_lengths(lengths), math.prod(model.grid))


def mean_tokens(tokens: Tensor, there: Tensor | None) -> Tensor:
    """The mean of tokens (..., B, N, D) over those that are there, see `tokens_there`: (..., B, D)."""
    if there is None:
        return tokens.mean(-2)
    return tokens.where(there[..., None], 0).sum(-2) / there.sum(-1, keepdim=True)


def _untold(model: SiT, given: Condition) -> Condition:
    """A condition that says nothing of the samples but their lengths."""
    if model.guidable:
        return model.without(given)
    return dataclasses.replace(given, labels=torch.zeros_like(given.labels))


class _Moments:
    """Sums over tokens, from which their covariance follows; in fp64, so that a large mean takes nothing from it."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Tensor] = []
        self._products: list[Tensor] = []

    def add(self, tokens: Tensor) -> None:
        """Tokens (blocks, M, D) of each block."""
        self.count += tokens.shape[1]
        for number, own in enumerate(map(Tensor.double, tokens)):
            if number == len(self._sums):
                self._sums.append(own.new_zeros(own.shape[1]))
                self._products.append(own.new_zeros(own.shape[1], own.shape[1]))
            self._sums[number] += own.sum(0)
            self._products[number].addmm_(own.T, own)

    def covariance(self) -> Tensor:
        """Of the tokens of each block, fp64 (blocks, D, D)."""
        means = torch.stack(self._sums) / self.count
        return torch.stack(self._products) / self.count - means[:, :, None] * means[:, None]
