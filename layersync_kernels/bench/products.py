"""`layersync bench products`: a projector's last layer and its loss beside the three matrix products in it, on the CPU.

No fusion can spare the products: they are the floor of what the loss costs, forward and backward. What is timed takes
turns, and ratios are medians over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console
from torch import Tensor

from ..runtime.memory import keep_freed_memory
from .cases import Case, provider
from .engine import describe_failure
from .machine import machine_facts
from .report import new_table

TOKENS, WIDTH = 8192, 1152
ROUNDS = 25
PROVIDERS = ("eager", "unfused", "cpp")


def products(hidden: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor) -> None:
    """Those of the linear layer and of both its gradients; the teacher stands for the gradient of its output."""
    with torch.no_grad():
        rows, gradient = hidden.flatten(0, -2), teacher.flatten(0, -2)
        torch.addmm(bias, rows, weight.t())
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), rows)


def differentiated(name: str, case: Case) -> Callable[..., object]:
    """A provider's loss with its gradients."""
    loss = provider(name, case)
    return lambda *inputs: torch.autograd.grad(loss(*inputs), inputs[:-1])


def measure(*, quick: bool = False) -> Iterator[dict[str, object]]:
    """A row for each dtype, of the products and of each provider; `quick`: three rounds of 256 tokens, 64 wide.

    Yields:
        `p50_ms`, and medians over rounds of the time over that of the products and over eager's; None where the
        provider cannot run, `problem` says why.
    """
    keep_freed_memory()
    tokens, width, rounds = (256, 64, 3) if quick else (TOKENS, WIDTH, ROUNDS)
    facts = machine_facts("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        case = Case("projected_alignment", tokens, width, dtype, "cpu")
        inputs = case.inputs(seed=0)
        ways: dict[str, Callable[..., object]] = {"products": products}
        problems: dict[str, str] = {}
        for name in PROVIDERS:
            try:
                way = differentiated(name, case)
                way(*inputs)
                ways[name] = way
            except Exception as error:  # as in `engine.measure`
                problems[name] = describe_failure(error)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items() if number % 2 else reversed(ways.items()):
                began = time.perf_counter()
                way(*inputs)
                if number > 0:
                    times[name].append(time.perf_counter() - began)
        for name in ("products", *PROVIDERS):
            yield {
                "op": "products", "case": case.name, "provider": name, "device": "cpu",
                "p50_ms": 1e3 * statistics.median(times[name]) if name in times else None,
                "over_products": _ratio(times, name, "products"), "over_eager": _ratio(times, name, "eager"),
                "problem": problems.get(name), "machine": facts,
            }  # fmt: skip


def _ratio(times: dict[str, list[float]], name: str, against: str) -> float | None:
    if name not in times or against not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[name], times[against], strict=True))


def print_table(rows: Sequence[dict[str, object]], console: Console) -> None:
    """The rows of `measure`."""
    title = "a linear layer with its loss, forward and backward"
    table = new_table(title, "case", "what", "ms", "x products", "x eager")
    for row in rows:
        numbers = [(row["p50_ms"], 1), (row["over_products"], 2), (row["over_eager"], 2)]
        cells = (f"{value:.{digits}f}" if isinstance(value, float) else "" for value, digits in numbers)
        table.add_row(str(row["case"]), str(row["provider"]), *cells)
    console.print(table)
