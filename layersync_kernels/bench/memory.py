"""`layersync bench memory`: the most memory that a loss takes, forward and backward, beside the eager formula's.

Counted on the CPU from what PyTorch's allocator hands out and takes back, so it is the same in every run. "Beyond the
gradients" is less what the gradients of the inputs take, which every provider has to return.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .cases import Case, Function, provider
from .engine import describe_failure
from .machine import machine_facts
from .report import new_table

CASES = (
    ("projected_alignment", 8192, 1152, ("eager", "unfused", "cpp")),
    ("gram_alignment", 3600, 1152, ("eager", "cpp")),
    ("gram_alignment", 16384, 1152, ("cpp",)),  # eager would take gigabytes
)


def peak_bytes(function: Function, inputs: Sequence[Tensor]) -> int:
    """Most bytes that a forward and a backward pass hold at a time beyond the inputs."""
    leaves = [x for x in inputs if x.requires_grad]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        gradients = torch.autograd.grad(function(*inputs), leaves)
        del gradients
    return most_held(profiler)


def most_held(profiler: profile) -> int:
    """Most bytes of tensors that were held at a time under a profiler with `profile_memory`, beyond those before it."""
    results: Any = profiler.profiler
    events = (event for event in results.kineto_results.events() if event.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(*, quick: bool = False) -> Iterator[dict[str, object]]:
    """A row for each case, dtype and provider; `quick`: of 256 tokens, 64 wide.

    Yields:
        `peak_bytes` and `beyond_gradients_bytes`; None where the provider cannot run, `problem` says why.
    """
    facts = machine_facts("cpu")
    for op, rows, width, providers in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(op, 256, 64, dtype, "cpu") if quick else Case(op, rows, width, dtype, "cpu")
            inputs = case.inputs(seed=0)
            gradients = sum(x.nbytes for x in inputs if x.requires_grad)
            for name in providers:
                row: dict[str, object] = {"op": "memory", "case": f"{op} {case.name}", "provider": name}
                row |= {"device": "cpu", "peak_bytes": None, "beyond_gradients_bytes": None, "problem": None}
                try:
                    peak = peak_bytes(provider(name, case), inputs)
                    row |= {"peak_bytes": peak, "beyond_gradients_bytes": peak - gradients}
                except Exception as error:  # as in `engine.measure`
                    row["problem"] = describe_failure(error)
                yield row | {"machine": facts}


def print_table(rows: Sequence[dict[str, object]], console: Console) -> None:
    """The rows of `measure`."""
    table = new_table("peak memory, forward and backward, MB", "case", "provider", "peak", "beyond the gradients")
    for row in rows:
        sizes = (row["peak_bytes"], row["beyond_gradients_bytes"])
        table.add_row(
            str(row["case"]),
            str(row["provider"]),
            *(f"{size / 1e6:.1f}" if isinstance(size, int) else "" for size in sizes),
        )
    console.print(table)
