"""Runs a program of this folder on tensors: the other end of driver.h."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from layersync_kernels.ops.rows import as_rows

FLOAT, BF16, HALF = TYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {FLOAT: "fp32", BF16: "bf16", HALF: "fp16"}


def run_program(
    program: Path,
    options: dict[str, float],
    rows: dict[str, Tensor | None],
    floats: Iterable[Tensor | None],
    outputs: Iterable[tuple[torch.dtype, tuple[int, ...]] | None],
) -> list[Tensor | None]:
    """Run `program` in the emulator.

    Args:
        program: what the fixture of that name has built.
        options: its numbers by name.
        rows: its tensors of rows, of any stride, in the order in which it reads them.
        floats: its contiguous fp32 tensors, which it reads after those.
        outputs: dtype and shape of its results in the order in which it writes them; None for one that is not written.

    Returns:
        The results.
    """
    stream = b""
    options = dict(options)
    for name, tensor in rows.items():
        options[f"{name}_type"] = -1
        if tensor is None:
            continue
        view = as_rows(tensor)
        storage = view.tensor.untyped_storage()
        options |= {
            f"{name}_type": TYPES.index(tensor.dtype),
            f"{name}_storage": storage.nbytes() // tensor.element_size(),
            f"{name}_offset": view.tensor.storage_offset(),
            f"{name}_inner": view.inner,
            f"{name}_outer_stride": view.outer_stride,
            f"{name}_inner_stride": view.inner_stride,
        }
        stream += bytes(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
    for tensor in floats:
        stream += b"" if tensor is None else tensor.contiguous().numpy().tobytes()
    arguments = [f"{name}={float(value)!r}" for name, value in options.items()]
    done = subprocess.run([program, *arguments], input=stream, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()

    results: list[Tensor | None] = []
    written = done.stdout
    for output in outputs:
        if output is None:
            results.append(None)
            continue
        dtype, shape = output
        count = torch.Size(shape).numel()
        part, written = written[: count * dtype.itemsize], written[count * dtype.itemsize :]
        flat = torch.frombuffer(bytearray(part), dtype=dtype) if count else torch.empty(0, dtype=dtype)
        results.append(flat.reshape(shape))
    assert not written
    return results


def assert_same_bits(one: Iterable[Tensor | None], other: Iterable[Tensor | None]) -> None:
    """Two runs gave the same results, NaN included."""
    for x, y in zip(one, other, strict=True):
        assert x is y or torch.equal(x.nan_to_num(nan=7.25), y.nan_to_num(nan=7.25))


def rows_of(*shape: int, dtype: torch.dtype = FLOAT, seed: int = 0) -> Tensor:
    """Normal random values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
