"""Peak memory of the family's losses beside the eager formulas, forward and backward, on the CPU.

python benchmarks/memory.py

Counted from what PyTorch's allocator hands out and takes back, so it is the same in every run. "Beyond the gradients"
is less what the gradients of the inputs take, which every provider has to return.
"""

from collections.abc import Sequence

import torch
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .cases import Case, Function, provider
from .report import new_table

CASES = (
    ("projected_alignment", 8192, 1152, ("eager", "unfused", "cpp")),
    ("gram_alignment", 3600, 1152, ("eager", "cpp")),
    ("gram_alignment", 16384, 1152, ("cpp",)),
)


def peak_bytes(function: Function, inputs: Sequence[Tensor]) -> int:
    """Most bytes that a forward and a backward pass hold at a time beyond the inputs."""
    leaves = [x for x in inputs if x.requires_grad]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        gradients = torch.autograd.grad(function(*inputs), leaves)
        del gradients
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    """Print the table."""
    table = new_table("peak memory, forward and backward, MB", "op", "case", "provider", "peak", "beyond the gradients")
    for op, rows, width, providers in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(op, rows, width, dtype, "cpu")
            inputs = case.inputs(seed=0)
            gradients = sum(x.nbytes for x in inputs if x.requires_grad)
            for name in providers:
                peak = peak_bytes(provider(name, case), inputs)
                table.add_row(op, case.name, name, f"{peak / 1e6:.1f}", f"{(peak - gradients) / 1e6:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
