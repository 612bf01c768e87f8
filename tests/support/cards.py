"""How well a launch should keep a card busy: a model from the machine code and the launch, no measurement.

One block is run (sass_run.py); the card is full of such blocks, as many as its limits let in. What could bind is
compared with the memory's bandwidth:

- latency (Little's law): bytes that resident warps have in flight, on average over the time a block takes, against
  bandwidth times LATENCY;
- issue: instructions of a byte against what the schedulers issue while the memory moves a byte; special functions
  likewise, which have 16 lanes of a multiprocessor;
- waves: blocks come in rounds of as many as are resident, the last of which leaves slots empty. A round takes the
  longest of: its bytes at full bandwidth, its instructions at full rate, and the time of one block alone.

Sources: CUDA C++ Programming Guide, technical specifications by compute capability; the occupancy calculator of Nsight
Compute for the granularity of allocations; NVIDIA's data sheets of A100 80GB SXM, H100 SXM and B200.
"""

from __future__ import annotations

from typing import NamedTuple

from layersync_kernels.compiler.cards import find_card

LANES = 32
LATENCY = 1e-6  # seconds from a load to its use under load; 0.4 to 0.6 without


class Card(NamedTuple):
    """Limits of a multiprocessor and rates of the card."""

    name: str
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes per second
    shared: int  # bytes of shared memory of a multiprocessor
    static_reserve: int  # bytes that a block takes beyond what the compiler reports
    blocks: int = 32
    warps: int = 64
    registers: int = 65536
    schedulers: int = 4
    special: int = 16  # lanes of the special function units

    @property
    def in_flight(self) -> float:
        """Bytes that a multiprocessor must have under way at all times."""
        return self.bandwidth / self.multiprocessors * LATENCY

    @property
    def issue(self) -> float:
        """Instructions (of a lane) that are issued while the memory moves a byte."""
        return self.multiprocessors * self.schedulers * LANES * self.clock / self.bandwidth

    @property
    def special_issue(self) -> float:
        """Special functions (of a lane) that are computed while the memory moves a byte."""
        return self.multiprocessors * self.special * self.clock / self.bandwidth


def _card(name: str, clock: float, bandwidth: float, static_reserve: int) -> Card:
    known = find_card(name)
    return Card(name, known.multiprocessors, clock, bandwidth, known.shared_per_multiprocessor, static_reserve)


CARDS = {
    80: _card("A100", 1.41e9, 2.039e12, 1024),
    90: _card("H100", 1.98e9, 3.35e12, 0),
    100: _card("B200", 1.965e9, 8e12, 0),
}


def _ceil(value: int, step: int) -> int:
    return -(-value // step) * step


def resident_blocks(card: Card, threads: int, registers: int, shared: int = 0) -> int:
    """Blocks that a multiprocessor holds at once.

    Registers are given to warps in units of 256, to a multiple of 4 warps; shared memory in units of 128 bytes.
    """
    warps = _ceil(threads, LANES) // LANES
    limits = [card.blocks, card.warps // warps]
    per_warp = _ceil(registers * LANES, 256)
    limits.append(card.registers // per_warp // card.schedulers * card.schedulers // warps)
    if shared + card.static_reserve:
        limits.append(card.shared // _ceil(shared + card.static_reserve, 128))
    return min(limits)


class Block(NamedTuple):
    """What one block of a launch did, as sass_run.Run tells, its loops at their full length."""

    instructions: float
    special: float  # of those, special functions
    divisions: float  # of those, conversions that begin a 64-bit division
    short_divisions: float  # a 32-bit one
    barriers: float  # that each warp waits at
    moved: float  # bytes of tensors that stream by, asked for by live lanes, each once
    loaded: float  # of those, loads
    sectors: float  # bytes of the sectors that these are in
    lanes: float
    accesses: float
    cycles: float

    @classmethod
    def of(cls, run, streamed) -> Block:
        """The figures of a run; `streamed` tells whether a tensor streams by."""

        def total(counts):
            return sum(count for tensor, count in counts.items() if streamed(tensor))

        def issued(*beginnings):
            return sum(count for name, count in run.names.items() if name.startswith(beginnings))

        return cls(
            run.instructions,
            issued("MUFU"),
            issued("I2F.U64"),
            issued("I2F.U32.RP", "I2F.RP"),
            run.barriers,
            total(run.unique),
            total({tensor: run.unique[tensor] for tensor in run.loaded}),
            total(run.sectors) * 32,
            run.lanes,
            run.accesses,
            run.cycles,
        )

    def repeated(self, longer: Block, times: float) -> Block:
        """As if what `longer` does more than this were done `times` times in addition."""
        return Block(*(one + times * (other - one) for one, other in zip(self, longer, strict=True)))


class Figures(NamedTuple):
    """What the model says of a launch."""

    blocks: int  # resident on a multiprocessor
    warps: int
    lanes: float  # share of live lanes in accesses to memory
    sectors: float  # share of the bytes of sectors that is asked for
    in_flight: float  # KiB that loads have under way on a multiprocessor, on average
    needed: float  # KiB
    instructions: float  # of a byte
    issue: float  # that the card could issue
    special: float  # special functions of a byte
    special_issue: float
    divisions: float  # 64-bit ones of a MiB
    short_divisions: float  # 32-bit ones
    barriers: float  # of a row, summed up over the blocks that share it
    waves: float
    idle: float  # share of the slots of all rounds that stay empty
    total: float  # bytes that the launch moves
    bandwidth: float  # share of the memory's bandwidth that all of this leaves

    @property
    def latency_share(self) -> float:
        """Of the bytes in flight that are needed."""
        return self.in_flight / self.needed

    @property
    def issue_share(self) -> float:
        """Of the rate of instructions that is needed; above 1 memory binds."""
        return min(self.issue / self.instructions, self.special_issue / max(self.special, 1e-9))


def figures(card: Card, registers: int, shared: int, threads: int, grid: int, rows: int, block: Block) -> Figures:
    """Compare a launch of `grid` blocks, for `rows` rows in all, with a card."""
    most = resident_blocks(card, threads, registers, shared)
    slots = most * card.multiprocessors
    filled = min(most, grid / card.multiprocessors)
    instructions, special = LANES * block.instructions / block.moved, LANES * block.special / block.moved
    # Seconds of a round of n blocks; a multiprocessor has at most so many of them as it issues for.
    slowest = max(instructions / card.issue, special / card.special_issue)

    def seconds(blocks: int) -> float:
        busiest = -(-blocks // card.multiprocessors) * card.multiprocessors
        move = block.moved / card.bandwidth
        return max(blocks * move, busiest * move * slowest, block.cycles / card.clock)

    rounds, last = divmod(grid, slots)
    time = rounds * seconds(slots) + (seconds(last) if last else 0)
    return Figures(
        blocks=most,
        warps=most * _ceil(threads, LANES) // LANES,
        lanes=block.lanes / (LANES * block.accesses),
        sectors=block.moved / block.sectors,
        in_flight=filled * block.loaded * LATENCY * card.clock / block.cycles / 1024,
        needed=card.in_flight / 1024 * block.loaded / block.moved,  # nothing waits for stores
        instructions=instructions,
        issue=card.issue,
        special=special,
        special_issue=card.special_issue,
        divisions=LANES * block.divisions / block.moved * 2**20,
        short_divisions=LANES * block.short_divisions / block.moved * 2**20,
        barriers=block.barriers * grid / rows,
        waves=grid / slots,
        idle=1 - grid / (-(-grid // slots) * slots),
        total=grid * block.moved,
        bandwidth=grid * block.moved / card.bandwidth / time,
    )
