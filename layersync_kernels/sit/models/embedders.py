"""Conditions: time and class label."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


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


class LabelEmbedder(nn.Module):
    """Embeds class labels; while training, a share of them becomes the null label `num_classes`."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, y: Tensor) -> Tensor:
        """Labels (N,) → (N, D)."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.num_classes, y)
        try:
            return self.embedding_table(y)
        except IndexError as error:  # raised on the CPU only: elsewhere the check would cost a synchronisation
            null = f"{self.num_classes} is the null label" if self.dropout_prob > 0 else "there is no null label"
            last = self.embedding_table.num_embeddings - 1
            raise ValueError(f"SiT: labels run from {y.min()} to {y.max()}; expected 0..{last} ({null})") from error
