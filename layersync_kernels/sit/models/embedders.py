"""Conditions: time, class label and words."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...ops.attention import length_mask
from ..batch import WHOLE, Share


class TimestepEmbedder(nn.Module):
    """Embeds times: cosines and sines of geometrically spaced frequencies, then an MLP."""

    def __init__(self, hidden_size: int, frequencies: int = 256, max_period: float = 10_000.0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.frequencies = frequencies
        self.max_period = max_period

    def forward(self, t: Tensor) -> Tensor:
        """Times (N,) → (N, D)."""
        # Computed here rather than kept in a buffer: `model.to(bfloat16)` would round a buffer to 8 bits, and
        # `to_empty` after a meta-device construction would leave it uninitialised.
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        half = self.frequencies // 2
        frequency = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(self.max_period) / half))
        angle = t[:, None] * frequency
        embedding = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(embedding.to(next(self.mlp.parameters()).dtype))


def drop(count: int, probability: float, share: Share, device: torch.device) -> Tensor:
    """Which conditions are left out: bool (count,), this process's of what is drawn for all that share a batch."""
    return share.of(torch.rand(count * share.world, device=device)) < probability


class LabelEmbedder(nn.Module):
    """Embeds class labels; while training, a share of them becomes the null label `num_classes`."""

    share: Share = WHOLE
    dropped: Tensor | None = None
    keep_dropped: bool = False

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, y: Tensor) -> Tensor:
        """Labels (N,) → (N, D)."""
        if self.training and self.dropout_prob > 0:
            dropped = drop(y.shape[0], self.dropout_prob, self.share, y.device)
            self.dropped = dropped if self.keep_dropped else None
            y = torch.where(dropped, self.num_classes, y)
        try:
            return self.embedding_table(y)
        except IndexError as error:  # raised on the CPU only: elsewhere the check would cost a synchronisation
            null = f"{self.num_classes} is the null label" if self.dropout_prob > 0 else "there is no null label"
            last = self.embedding_table.num_embeddings - 1
            raise ValueError(f"SiT: labels run from {y.min()} to {y.max()}; expected 0..{last} ({null})") from error


class TextEmbedder(nn.Module):
    """Embeds the words of a text; a learnt word stands for a text of none, which a share of them becomes in training.

    Args:
        text_width: E, channels of the words.
        hidden_size: D.
        dropout_prob: share of texts that are left out while training.
        pooled: whether the words are averaged into one vector.
    """

    share: Share = WHOLE
    dropped: Tensor | None = None
    keep_dropped: bool = False

    def __init__(self, text_width: int, hidden_size: int, dropout_prob: float, *, pooled: bool) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.empty(text_width))
        self.mlp = nn.Sequential(nn.Linear(text_width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.dropout_prob, self.pooled = dropout_prob, pooled

    def forward(self, text: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Words (N, L, E), of which `lengths` (N,) are there → (N, L, D), or pooled (N, D); and how many there are."""
        if lengths is None:
            lengths = torch.full((text.shape[0],), text.shape[1], device=text.device)
        if self.training and self.dropout_prob > 0:
            dropped = drop(text.shape[0], self.dropout_prob, self.share, text.device)
            self.dropped = dropped if self.keep_dropped else None
            lengths = torch.where(dropped, 0, lengths)
        without = lengths == 0
        words = torch.where(without[:, None, None], self.null, text.to(self.null.dtype))
        lengths = torch.where(without, 1, lengths)
        if self.pooled:
            there = length_mask(lengths, text.shape[1])[..., None]
            return self.mlp(torch.where(there, words, 0).sum(1) / lengths[:, None]), lengths
        return self.mlp(words), lengths


def share_draws(model: nn.Module, share: Share) -> None:
    """Makes a model leave out conditions as one of several processes that have a batch together, with equal generators.

    Args:
        model: with embedders of this file.
        share: of a pass.
    """
    for embedder in _embedders(model):
        embedder.share = share


def keep_dropped(model: nn.Module) -> None:
    """Makes a model remember which conditions it leaves out, for `dropped_conditions`."""
    for embedder in _embedders(model):
        embedder.keep_dropped = True


def dropped_conditions(model: nn.Module) -> Tensor | None:
    """Which conditions the last forward pass in training left out: bool (N,); None: it leaves out none."""
    return next((embedder.dropped for embedder in _embedders(model)), None)


def _embedders(model: nn.Module) -> Iterator[LabelEmbedder | TextEmbedder]:
    return (module for module in model.modules() if isinstance(module, LabelEmbedder | TextEmbedder))
