"""Links between GPUs, and storage, by name: rates that others state. None of them was measured here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...errors import ConfigError

_NVIDIA = "NVIDIA's data sheet, half of the sum of both directions"
_LINE = "the line rate of its data sheet, one card a GPU"
_GIVEN = "as given"


@dataclass(frozen=True)
class Link:
    """What connects a GPU with others.

    Attributes:
        name: as `find_link` takes it.
        gigabytes_per_s: 1e9 bytes a second that a GPU sends while it receives as much.
        microseconds: from one GPU to the next, for each step of a ring.
        source, latency_source: where they are from.
    """

    name: str
    gigabytes_per_s: float
    microseconds: float
    source: str
    latency_source: str = "what NCCL's tuner assumes of a step of a ring (src/graph/tuning.cc, LL128)"

    def __post_init__(self) -> None:
        if not (self.gigabytes_per_s > 0 and math.isfinite(self.gigabytes_per_s)):
            raise ConfigError(f"a link of {self.gigabytes_per_s} GB/s: expected a finite rate above 0")
        if not (self.microseconds >= 0 and math.isfinite(self.microseconds)):
            raise ConfigError(f"a link with a latency of {self.microseconds} µs: expected a finite time of at least 0")


LINKS = {
    link.name: link
    for link in (
        Link("nvlink3", 300, 1.9, f"NVLink of A100: {_NVIDIA}"),
        Link("nvlink4", 450, 1.9, f"NVLink of H100 and H200: {_NVIDIA}"),
        Link("nvlink5", 900, 1.9, f"NVLink of B200: {_NVIDIA}"),
        Link("pcie4", 32, 2.5, f"PCIe 4.0 x16: {_NVIDIA}"),
        Link("pcie5", 64, 2.5, f"PCIe 5.0 x16: {_NVIDIA}"),
        Link("infiniband-hdr", 25, 4.0, f"InfiniBand HDR, 200 Gb/s: {_LINE}"),
        Link("infiniband-ndr", 50, 4.0, f"InfiniBand NDR, 400 Gb/s: {_LINE}"),
        Link("ethernet-100", 12.5, 4.0, f"Ethernet, 100 Gb/s: {_LINE}"),
        Link("ethernet-400", 50, 4.0, f"Ethernet, 400 Gb/s: {_LINE}"),
    )
}
"""Links by name. Rates are bytes of each direction; what a collective reaches of them is less."""


class Fabric(NamedTuple):
    """Names of the links that a card is sold with: inside of a node, and between nodes for each GPU."""

    intra: str
    inter: str


FABRICS = {
    "a100": Fabric("nvlink3", "infiniband-hdr"),
    "h100": Fabric("nvlink4", "infiniband-ndr"),
    "h200": Fabric("nvlink4", "infiniband-ndr"),
    "b200": Fabric("nvlink5", "infiniband-ndr"),
}
"""By the name of a card: those of NVIDIA's DGX systems."""


def find_link(wish: str, microseconds: float | None = None, *, like: str) -> Link:
    """A link by its name or its rate.

    Args:
        wish: a name, or GB/s of a GPU in each direction.
        microseconds: a latency in place of the link's own.
        like: name of the link whose latency one given by its rate has.

    Raises:
        ConfigError: no such link, or numbers out of range.
    """
    link = LINKS.get(wish.lower())
    if link is None:
        try:
            rate = float(wish)
        except ValueError:
            raise ConfigError(f"no link is named {wish!r}; expected GB/s, or one of {', '.join(LINKS)}") from None
        link = Link(wish, rate, LINKS[like].microseconds, _GIVEN)
    return link if microseconds is None else replace(link, microseconds=microseconds, latency_source=_GIVEN)


class Storage(NamedTuple):
    """Where checkpoints go, and data come from.

    Attributes:
        name: as `find_storage` takes it.
        gigabytes_per_s: 1e9 bytes a second that all GPUs of a node write together.
        source: where that is from.
    """

    name: str
    gigabytes_per_s: float
    source: str


STORAGES = {
    storage.name: storage
    for storage in (
        Storage("nvme", 3.5, "a drive in each node: sequential writes of a Samsung PM9A3 (U.2), as announced"),
        Storage(
            "object", 12.5, "object or file storage behind 100 Gb/s of each node: a line rate, no store's own limit"
        ),
    )
}
"""Storage by name."""


def find_storage(wish: str) -> Storage:
    """Storage by its name or its rate.

    Args:
        wish: a name, or GB/s of a node.

    Raises:
        ConfigError: no such storage, or a rate that is not above 0.
    """
    if (storage := STORAGES.get(wish.lower())) is not None:
        return storage
    try:
        rate = float(wish)
    except ValueError:
        raise ConfigError(f"no storage is named {wish!r}; expected GB/s, or one of {', '.join(STORAGES)}") from None
    if not (rate > 0 and math.isfinite(rate)):
        raise ConfigError(f"--storage-gbs {wish}: expected a finite rate above 0")
    return Storage(wish, rate, _GIVEN)
