"""Times the public ops of two checkouts against each other, in one run.

python benchmarks/revisions.py OLD NEW [--rounds 15] [--threads 2]

OLD and NEW are folders with a built package. Each runs in a process of its own, which waits while the other one is
timed; rounds alternate, and the ratio is the median over rounds of new / old.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MINIMUM_SECONDS = 0.05
"""A round repeats a call for at least this long."""


def cases() -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """Name → (op, tensors that it differentiates and constants), by public names that every revision has."""
    import torch

    from layersync_kernels import functional as F

    def draw(*shape: int, dtype: torch.dtype) -> Any:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    made: dict[str, tuple[Callable[..., Any], list[Any]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")

        def tokens(batch: int = 8, count: int = 256, width: int = 1152, dtype: torch.dtype = dtype) -> Any:
            return draw(batch, count, width, dtype=dtype)

        def modulation(dtype: torch.dtype = dtype) -> Any:
            return draw(8, 1152, dtype=dtype)

        made |= {
            f"layersync_loss {name}": (F.layersync_loss, [tokens(), tokens().detach()]),
            f"layersync_loss, 16 values, {name}": (F.layersync_loss, [tokens(1, 2, 8), tokens(1, 2, 8).detach()]),
            f"projected_alignment_loss {name}": (
                F.projected_alignment_loss,
                [tokens(), draw(768, 1152, dtype=dtype), draw(768, dtype=dtype), tokens(width=768).detach()],
            ),
            f"gram_alignment_loss {name}": (F.gram_alignment_loss, [tokens(), tokens(width=768).detach()]),
            f"dispersive_loss {name}": (F.dispersive_loss, [tokens(16, 64)]),
            f"spatial_norm {name}": (F.spatial_norm, [tokens().detach()]),
            f"modulated_layer_norm {name}": (F.modulated_layer_norm, [tokens(), modulation(), modulation()]),
            f"gated_residual_norm {name}": (
                F.gated_residual_norm,
                [tokens(), tokens(), modulation(), modulation(), modulation()],
            ),
            f"gelu_mlp {name}": (
                F.gelu_mlp,
                [tokens(2, 256, 384), *(draw(*s, dtype=dtype) for s in ((1536, 384), (1536,), (384, 1536), (384,)))],
            ),
            f"self_attention {name}": (lambda qkv: F.self_attention(qkv, 6), [tokens(2, 256, 1152)]),
        }
    return made


def worker(folder: Path, threads: int) -> None:
    """Answers each name on standard input with the seconds of a call, forward and backward."""
    import torch

    import layersync_kernels

    found = Path(layersync_kernels.__file__)
    if folder.resolve() not in found.resolve().parents:
        raise SystemExit(f"expected the package of {folder}, found {found}")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    known = cases()
    print(json.dumps(list(known)), flush=True)
    for line in sys.stdin:
        op, inputs = known[line.strip()]
        calls, began = 0, time.perf_counter()
        while calls < 2 or time.perf_counter() - began < MINIMUM_SECONDS:
            if calls == 1:  # the first warms up
                began = time.perf_counter()
            output = op(*inputs)
            output = output[1] if isinstance(output, tuple) else output
            if output.requires_grad:
                output.sum().backward()
            for x in inputs:
                x.grad = None
            calls += 1
        print((time.perf_counter() - began) / (calls - 1), flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="*", metavar="OLD NEW")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.checkouts[0], arguments.threads)
        return
    if len(arguments.checkouts) != 2:
        parser.error("expected two folders, OLD and NEW")
    processes = []
    for folder in arguments.checkouts:
        command = [sys.executable, __file__, str(folder), "--worker", "--threads", str(arguments.threads)]
        environment = os.environ | {
            "PYTHONPATH": str(folder.resolve()),
            "OMP_WAIT_POLICY": "passive",  # whoever waits must not spin on the other's cores
            "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # as the trainer keeps freed memory
            "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        }
        processes.append(
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )

    def ask(process: subprocess.Popen[str], name: str) -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(name + "\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    names: list[list[str]] = [json.loads(process.stdout.readline()) for process in processes if process.stdout]
    table = Table("op", "old ms", "new ms", "new / old", "its quartiles")
    for name in names[0]:
        rounds = []
        for number in range(arguments.rounds):
            order = processes if number % 2 else processes[::-1]
            seconds = {process: ask(process, name) for process in order}
            rounds.append([seconds[process] for process in processes])
        ratios = [new / old for old, new in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        old, new = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
        table.add_row(name, f"{old:.3f}", f"{new:.3f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)
    for process in processes:
        process.kill()


if __name__ == "__main__":
    main()
