"""Bytes and kernels of a training step of SiT, counted: by which kernels the blocks run on, and with LayerSync."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..compiler.analysis import KINDS, StepCount, block_count, count_step, ideal_block
from ..losses.layersync import LayerSyncLoss
from ..losses.pairs import default_pair
from ..losses.projectors import mlp
from ..sit.diffusion.transport import create_transport
from ..sit.models.registry import sit_models
from .cases import eager_loss
from .machine import machine_facts
from .report import new_table

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
LATENT = (4, 32, 32)
"""Whose traffic is counted: what the autoencoder makes of 256 x 256 pixels."""
_PROJECTOR_WIDTH, _TEACHER_WIDTH = 2048, 768  # REPA's, and those of DINOv2 ViT-B
_OUTSIDE = tuple(kind for kind in KINDS if kind not in ("products", "attention"))


@dataclass(frozen=True)
class Provider:
    """A way to run the model.

    Attributes:
        kernels, recompute: as `sit.SiT` takes them.
        aligned: with LayerSync; eager kernels have the eager loss.
        repa: with REPA's loss on the first block, its projector in fp32 or autocast; eager kernels have the eager loss.
    """

    kernels: str
    recompute: str = "none"
    aligned: bool = False
    repa: bool = False


PROVIDERS = {
    "eager": Provider("eager"),
    "eager + LayerSync": Provider("eager", aligned=True),
    "fused": Provider("fused"),
    "fused + LayerSync": Provider("fused", aligned=True),
    "fused, recompute": Provider("fused", recompute="light"),
}


def training_step(
    provider: Provider, model: str, batch: int, autocast: torch.dtype | None, depth: int, **options: Any
) -> Callable[[], Tensor]:
    """The forward pass of a training step on random latents (4, 32, 32), up to the loss.

    Args:
        provider: how to run the model.
        model: name of `sit.sit_models`.
        batch: images.
        autocast: dtype, or None for none.
        depth: blocks.
        options: of `sit.SiT`, beyond those.
    """
    torch.manual_seed(0)
    options = {"input_size": LATENT[1], **options}
    network = sit_models[model](depth=depth, kernels=provider.kernels, recompute=provider.recompute, **options).train()
    transport = create_transport()
    alignment = LayerSyncLoss([default_pair(depth)]) if provider.aligned else None
    samples = torch.randn(batch, *network.spec.shape)
    inputs: dict[str, Any] = {"y": torch.arange(batch) % network.num_classes}
    if alignment is not None:
        inputs["capture"] = alignment.captures if provider.kernels == "fused" else alignment.layers
    if provider.repa:
        inputs["capture"] = (1,)
        projector = mlp(network.hidden_size, *[_PROJECTOR_WIDTH] * 2, _TEACHER_WIDTH)
        features = torch.randn(batch, math.prod(network.grid), _TEACHER_WIDTH)

    def forward() -> Tensor:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            terms = transport.training_losses(network, samples, inputs)
            loss = terms["loss"].mean()
            if provider.repa:
                hidden = terms["states"][1]
                fused = provider.kernels == "fused"
                return loss + 0.5 * (projector(hidden, features) if fused else eager_loss(projector(hidden), features))
            if alignment is None:
                return loss
            if provider.kernels == "fused":
                return loss + alignment(terms["states"])
            ((student, teacher),) = alignment.pairs
            return loss + 0.2 * eager_loss(terms["states"][student], terms["states"][teacher].detach())

    return forward


def measure(model: str, batch: int, precision: str) -> list[dict[str, object]]:
    """Count a step of every provider, and one block of it. Runs on the CPU, on any machine the same.

    Args:
        model: name of `sit.sit_models`.
        batch: images.
        precision: key of `PRECISIONS`.

    Returns:
        a row per provider and one, "ideal", of a block alone. MD is batch · tokens · width · 4 bytes.
    """
    autocast = PRECISIONS[precision]
    with torch.device("meta"):
        network = sit_models[model](input_size=LATENT[1])
    elements = batch * math.prod(network.grid) * network.hidden_size
    steps = {
        name: count_step(training_step(provider, model, batch, autocast, network.depth))
        for name, provider in PROVIDERS.items()
    }
    common = {
        "op": "traffic",
        "case": f"{model} batch {batch}, {precision}",
        "device": "cpu",
        "md_bytes": 4 * elements,
        "machine": machine_facts("cpu"),
    }
    rows = []
    for name, provider in PROVIDERS.items():
        step, row = steps[name], {**common, "provider": name}
        row |= {f"step_{key}": value for key, value in _facts(step).items()}
        row["traffic_vs_eager"] = step.outside.total / steps["eager"].outside.total
        row["saved_vs_eager"] = step.saved_bytes / steps["eager"].saved_bytes
        if provider.aligned:  # the blocks are those of the same kernels without it
            row["alignment_bytes"] = (step - steps[provider.kernels]).outside.total
        else:
            block = block_count(functools.partial(training_step, provider, model, batch, autocast))
            row |= {f"block_{key}": value for key, value in _facts(block).items()}
        rows.append(row)
    ideal = ideal_block(elements, branch=autocast or torch.float32)
    return [*rows, {**common, "provider": "ideal", **{f"block_{key}": value for key, value in _facts(ideal).items()}}]


def _facts(count: StepCount) -> dict[str, object]:
    return {
        "bytes": count.outside.total,
        "bytes_read": count.outside.read,
        "bytes_written": count.outside.written,
        "bytes_by_kind": {kind: count.kind(kind).total for kind in _OUTSIDE},
        "kernels": count.outside.kernels,
        "kernels_inside": count.inside.kernels,
        "saved_bytes": count.saved_bytes,
        "saved_weight_bytes": count.weight_bytes,
    }


def print_tables(rows: list[dict[str, Any]], console: Console) -> None:
    """The rows of `measure`: one table for a block, one for the step."""
    case, md = rows[0]["case"], rows[0]["md_bytes"]
    blocks = [row for row in rows if "block_bytes" in row]
    kinds = [kind for kind in _OUTSIDE if any(row["block_bytes_by_kind"][kind] for row in blocks)]
    console.print(f"traffic, {case}: bytes moved outside of matrix products and attention", highlight=False)
    table = new_table(f"one block more, in MD of {md / 1e6:.2f} MB", "blocks", *kinds, "all", "kernels", "saved")
    for row in blocks:
        parts = [row["block_bytes_by_kind"][kind] for kind in kinds]
        moved = (f"{nbytes / md:.2f}" for nbytes in (*parts, row["block_bytes"]))
        table.add_row(row["provider"], *moved, str(row["block_kernels"]), f"{row['block_saved_bytes'] / md:.2f}")
    console.print(table)
    columns = ("MB", "% eager", "LayerSync", "kernels", "saved MB", "% eager")
    title = "the whole step; LayerSync in MD; kernels outside + inside; saved activations + copies of weights"
    table = new_table(title, "step", *columns)
    for row in rows:
        if "step_bytes" in row:
            table.add_row(row["provider"], *_step_cells(row, md))
    console.print(table)


def _step_cells(row: dict[str, Any], md: int) -> Iterator[str]:
    yield f"{row['step_bytes'] / 1e6:.1f}"
    yield f"{100 * row['traffic_vs_eager']:.1f}"
    yield f"{row['alignment_bytes'] / md:.2f}" if "alignment_bytes" in row else ""
    yield f"{row['step_kernels']} + {row['step_kernels_inside']}"
    yield f"{row['step_saved_bytes'] / 1e6:.0f} + {row['step_saved_weight_bytes'] / 1e6:.0f}"
    yield f"{100 * row['saved_vs_eager']:.1f}"
