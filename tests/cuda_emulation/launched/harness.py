"""What the tests of the launchers share: the emulator's settings, and inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .. import launchers

FLOAT, BF16, HALF = TYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {FLOAT: "fp32", BF16: "bf16", HALF: "fp16"}


@contextlib.contextmanager
def emulated(seed: int = 0, max_row_blocks: int = 4096) -> Iterator[None]:
    """Order blocks and threads by a seed; give row kernels at most so many blocks."""
    library = launchers.library()
    library.emulation_set_seed(seed)
    library.emulation_set_max_row_blocks(max_row_blocks)
    try:
        yield
    finally:
        library.emulation_set_seed(0)
        library.emulation_set_max_row_blocks(4096)


def same_for_all(seeds: Iterable[int], call: Callable[[], tuple[Tensor, ...]], **settings: int) -> tuple[Tensor, ...]:
    """What a call returns with the first seed; it must return the same bits with the others."""
    first, *others = seeds
    with emulated(first, **settings):
        results = call()
    for seed in others:
        with emulated(seed, **settings):
            assert_same_bits(results, call())
    return results


def assert_same_bits(one: Iterable[Tensor | None], other: Iterable[Tensor | None]) -> None:
    """Two runs gave the same results, NaN included."""
    for x, y in zip(one, other, strict=True):
        assert x is y or torch.equal(x.nan_to_num(nan=7.25), y.nan_to_num(nan=7.25))


def rows_of(*shape: int, dtype: torch.dtype = FLOAT, seed: int = 0) -> Tensor:
    """Normal random values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
