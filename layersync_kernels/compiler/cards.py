"""GPUs by name: what Inductor asks of one when it lowers a graph, and the rates that a prediction of time needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ..errors import UserError


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as `find_card` takes it.
        title: as the driver names it.
        capability: major, minor.
        multiprocessors: their number.
        memory, l2: bytes.
        shared_per_block, shared_per_multiprocessor: bytes, the first as a kernel may opt in to.
        terabytes_per_s: of its memory.
        teraflops: dtype → rate of matrix products.
        source: where both rates are from.
    """

    name: str
    title: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    l2: int
    shared_per_block: int
    shared_per_multiprocessor: int
    terabytes_per_s: float
    teraflops: dict[torch.dtype, float]
    source: str

    def with_rates(self, terabytes_per_s: float | None = None, teraflops: float | None = None) -> Card:
        """The card with a rate or both replaced; that of matrix products for all dtypes.

        Raises:
            ValueError: a rate that is not above 0.
        """
        for name, rate in (("bandwidth", terabytes_per_s), ("matmul", teraflops)):
            if rate is not None and not rate > 0:
                raise ValueError(f"{name}={rate}: expected a rate above 0")
        changed: dict[str, object] = {}
        given = []
        if terabytes_per_s is not None:
            changed["terabytes_per_s"] = terabytes_per_s
            given.append("bandwidth")
        if teraflops is not None:
            changed["teraflops"] = dict.fromkeys(self.teraflops, teraflops)
            given.append("matmul rate")
        if not given:
            return self
        rest = "" if len(given) == 2 else f"; the rest: {self.source}"
        return dataclasses.replace(self, **changed, source=f"{' and '.join(given)} as given{rest}")  # type: ignore[arg-type]


_HALVES = (torch.bfloat16, torch.float16)
_SHEET = "NVIDIA's data sheet, which no program reaches"


def _rates(half: float, single: float) -> dict[torch.dtype, float]:
    # PyTorch multiplies fp32 matrices outside of the tensor cores unless it is told otherwise (TF32).
    return {**dict.fromkeys(_HALVES, half), torch.float32: single}


CARDS = {
    card.name: card
    for card in (
        Card("h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 80 << 30, 50 << 20, 232448, 233472, 3.0, _rates(798, 67),
             "read from a card: a copy, a product of bf16 matrices; fp32 is the data sheet's"),
        Card("a100", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 80 << 30, 40 << 20, 166912, 167936, 2.039, _rates(312, 19.5),
             _SHEET),
        Card("h200", "NVIDIA H200", (9, 0), 132, 141 << 30, 50 << 20, 232448, 233472, 4.8, _rates(989, 67), _SHEET),
        Card("b200", "NVIDIA B200", (10, 0), 148, 180 << 30, 126 << 20, 232448, 233472, 8.0, _rates(2250, 75), _SHEET),
    )
}  # fmt: skip
"""Cards by name."""


def card_of(title: str) -> Card | None:
    """The card that the driver names so, or None where its rates are not known."""
    return next((card for card in CARDS.values() if card.title == title), None)


def find_card(name: str) -> Card:
    """The card of that name, in upper or lower case.

    Raises:
        UserError: there is none; lists those known.
    """
    card = CARDS.get(name.lower())
    if card is None:
        raise UserError(f"no card is named {name!r}; known: {', '.join(CARDS)}")
    return card
