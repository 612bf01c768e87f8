"""The tables of `layersync bench traffic --device h100`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ..compiler.gpu_graph import GROUPS
from .report import new_table

_TITLES = {
    "block": "one block more, the model compiled as a whole",
    "block alone": "a block compiled by itself",
}


def print_tables(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The rows of `gpu_traffic.measure`."""
    facts = next(row for row in rows if row["part"] == "facts")
    md = facts["md_bytes"]
    console.print(
        f"traffic, {facts['case']}, on the graphs of {facts['card']}; MD is {md / 1e6:.1f} MB", highlight=False
    )
    for part, title in _TITLES.items():
        if any(row["part"] == part for row in rows):
            _print_blocks([row for row in rows if row["part"] == part], title, md, console)
    if any(row["part"] == "step" for row in rows):
        _print_steps(rows, md, console)
    registers = next(row["kernels"] for row in rows if row["part"] == "registers")
    if registers:
        _print_registers(registers, md, console)
    console.print(
        f"Prediction for {facts['terabytes_per_s']:g} TB/s and {facts['teraflops']:g} TFLOP/s ({facts['rates_from']}):",
        highlight=False,
    )
    for assumption in facts["assumptions"]:
        console.print(f"- {assumption}", highlight=False)
    state = "on" if facts["mix_order_reduction"] else "off"
    console.print(f"Inductor's mix-order reductions are {state} (torch._inductor.config.triton)", highlight=False)
    for reason in facts["skipped"]:
        console.print(f"skipped: {reason}", highlight=False)


def _print_blocks(rows: Sequence[dict[str, Any]], title: str, md: int, console: Console) -> None:
    columns = [*GROUPS, "outside", "kernels", "kept", "predicted ms", "bound by"]
    table = new_table(f"{title}: MD moved, MD kept for backward", "provider", *columns)
    for row in rows:
        table.add_row(
            row["provider"],
            *(f"{row['bytes_by_group'][group] / md:.1f}" for group in GROUPS),
            f"{row['bytes_outside'] / md:.1f}",
            str(row["launches"]),
            f"{row['saved_bytes'] / md:.1f}",
            f"{row['predicted_ms']:.2f}",
            row["predicted_bound_by"],
        )
    console.print(table)


def _print_steps(rows: Sequence[dict[str, Any]], md: int, console: Console) -> None:
    losses = [f"{loss}\n{unit}" for loss in ("LayerSync", "REPA") for unit in ("MD", "ms")]
    columns = ["GB", "kernels", "kept", "ms", "images/s", "memory\n%", *losses]
    table = new_table(
        "the whole step: GB outside of gemm and attention, GB kept; what losses add\n"
        "ms, images/s and the share of the time that memory holds up are predicted",
        "provider",
        *columns,
    )
    for row in rows:
        if row["part"] != "step":
            continue
        of = {other["part"]: other for other in rows if other.get("provider") == row["provider"]}
        table.add_row(
            row["provider"],
            f"{row['bytes_outside'] / 1e9:.1f}",
            str(row["launches"]),
            f"{row['saved_bytes'] / 1e9:.1f}",
            f"{row['predicted_ms']:.1f}",
            f"{row['predicted_images_per_s']:.0f}",
            f"{100 * row['predicted_memory_ms'] / row['predicted_ms']:.0f}",
            *(
                text
                for loss in ("LayerSync", "REPA")
                for text in (f"{of[loss]['bytes_outside'] / md:.1f}", f"{of[loss]['predicted_ms']:.2f}")
            ),
        )
    console.print(table)


def _print_registers(kernels: Sequence[dict[str, Any]], md: int, console: Console) -> None:
    table = new_table("kernels of a block by itself, from their machine code", "kernel", "MD", "registers", "spilled B")
    for row in kernels:
        name = row["name"] if len(row["name"]) <= 64 else row["name"][:61] + "..."
        least, most = row["registers"]
        table.add_row(
            name, f"{row['bytes'] / md:.2f}", f"{least}-{most}" if least < most else f"{most}", str(row["spilled"])
        )
    console.print(table)
