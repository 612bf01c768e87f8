"""A projector's last layer with its loss beside the three matrix products in it, which no fusion can spare, on the CPU.

python benchmarks/products.py

8192 tokens, 1152 -> 768, forward and backward. What is timed takes turns, and ratios are medians over rounds.
"""

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor

from ..runtime.memory import keep_freed_memory
from .cases import Case, provider
from .report import new_table

ROUNDS = 25


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


def main() -> None:
    """Print the table."""
    keep_freed_memory()
    table = new_table("8192 x 1152 -> 768, forward and backward", "dtype", "what", "ms", "x products", "of eager")
    for dtype in (torch.float32, torch.bfloat16):
        case = Case("projected_alignment", 8192, 1152, dtype, "cpu")
        inputs = case.inputs(seed=0)
        ways: dict[str, Callable[..., object]] = {"products": products} | {
            name: differentiated(name, case) for name in ("eager", "unfused", "cpp")
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(ROUNDS + 1):
            for name, way in ways.items() if number % 2 else reversed(ways.items()):
                began = time.perf_counter()
                way(*inputs)
                if number > 0:
                    times[name].append(time.perf_counter() - began)
        for name, own in times.items():
            over = statistics.median(a / b for a, b in zip(own, times["products"], strict=True))
            share = statistics.median(a / b for a, b in zip(own, times["eager"], strict=True))
            milliseconds = f"{1e3 * statistics.median(own):.1f}"
            table.add_row(str(dtype).removeprefix("torch."), name, milliseconds, f"{over:.2f}", f"{share:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
