"""The tables of `layersync scale`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from ...compiler.cards import Card
from ..report import new_table
from .inputs import Inputs
from .model import Estimate

_MEMORY = ("weights", "copies", "gradients", "optimizer", "ema", "activations", "total")


def print_tables(rows: Sequence[tuple[Inputs, Estimate]], card: Card, console: Console) -> None:
    """Three tables, a line for each number of GPUs; then which of them a card has no memory for."""
    _print_steps(rows, console)
    _print_memory(rows, console)
    _print_storage(rows, console)
    for inputs, result in rows:
        if result.memory.total > card.memory:
            console.print(
                f"{inputs.gpus} GPUs: {result.memory.total / 1e9:.1f} GB do not fit into the "
                f"{card.memory / 1e9:.1f} GB of {card.title}",
                highlight=False,
            )


def _print_steps(rows: Sequence[tuple[Inputs, Estimate]], console: Console) -> None:
    columns = [
        "batch",
        "compute\nms",
        "comm.\nms",
        "exposed\nms",
        "step\nms",
        "images/s",
        "% of\nalone",
        "sent\nGB",
        "out of\nnode GB",
    ]
    table = new_table("a step, modelled; batch and bytes are those of a GPU", "GPUs", *columns)
    for inputs, result in rows:
        table.add_row(
            str(inputs.gpus),
            str(inputs.batch),
            f"{result.compute_ms:.1f}",
            f"{result.communication_ms:.1f}",
            f"{result.exposed_ms:.1f}",
            f"{result.step_ms:.1f}",
            f"{result.images_per_s:.0f}",
            f"{100 * result.efficiency:.1f}",
            f"{result.wire_bytes / 1e9:.2f}",
            f"{result.between_bytes / 1e9:.2f}",
        )
    console.print(table)


def _print_memory(rows: Sequence[tuple[Inputs, Estimate]], console: Console) -> None:
    table = new_table("memory of a GPU in GB, counted: what training keeps, without workspaces", "GPUs", *_MEMORY)
    for inputs, result in rows:
        table.add_row(str(inputs.gpus), *(f"{getattr(result.memory, name) / 1e9:.2f}" for name in _MEMORY))
    console.print(table)


def _print_storage(rows: Sequence[tuple[Inputs, Estimate]], console: Console) -> None:
    columns = ("checkpoint\nGB", "GB of a\nprocess", "seconds", "% of the\ntime", "data\nGB/s", "data GB/s\nof a node")
    table = new_table("checkpoints and data, modelled", "GPUs", *columns)
    for inputs, result in rows:
        table.add_row(
            str(inputs.gpus),
            f"{result.checkpoint_bytes / 1e9:.2f}",
            f"{result.checkpoint_rank_bytes / 1e9:.3f}",
            f"{result.checkpoint_s:.2f}",
            f"{100 * result.checkpoint_share:.3f}",
            f"{result.data_gbs:.3f}",
            f"{result.data_gbs / inputs.nodes:.4f}",
        )
    console.print(table)
