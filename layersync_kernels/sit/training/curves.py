"""Curves of loss and cosine as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import new_figure, plain_ticks, save_figure


def save_curves(records: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draws loss and cosine over steps from the records of ``metrics.jsonl``."""
    figure = new_figure(9, 3.6)
    loss_axes, cosine_axes = figure.subplots(1, 2)
    loss_axes.plot([r["step"] for r in records], [r["loss"] for r in records], color="tab:blue")
    loss_axes.set(xlabel="step", ylabel="velocity loss", title="Loss")
    if any(r["loss"] > 0 for r in records):
        loss_axes.set_yscale("log")
    for axis in (loss_axes.xaxis, loss_axes.yaxis, cosine_axes.xaxis, cosine_axes.yaxis):
        plain_ticks(axis)
    pairs = sorted({pair for r in records for pair in r.get("cosine", {})})
    for pair in pairs:
        with_pair = [r for r in records if pair in r.get("cosine", {})]
        cosine_axes.plot([r["step"] for r in with_pair], [r["cosine"][pair] for r in with_pair], label=pair)
    cosine_axes.set(xlabel="step", ylabel="mean cosine", title="Student to teacher")
    if pairs:
        cosine_axes.legend(title="blocks")
    for axes in (loss_axes, cosine_axes):
        axes.grid(alpha=0.3)
    return save_figure(figure, path)
