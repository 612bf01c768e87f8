"""Pairs of blocks: which student learns from which teacher."""

from __future__ import annotations

from collections.abc import Iterable

_PUBLISHED_PAIRS = {28: (8, 16), 24: (8, 18), 30: (9, 17)}  # SiT-XL, SiT-L, Wan 2.1 1.3B

Block = int | str
"""A block's depth, counted from 1, or a name of its own."""


def default_pair(depth: int) -> tuple[int, int]:
    """The (student, teacher) blocks to start from for a model of `depth` blocks, counted from 1.

    Published pairs where there are any (depth 24, 28, 30), else the mean relative depths of SiT's two, 0.31 and 0.66:
    the student is not among the very first blocks, the teacher not among the last fifth (from depth 4 on).

    Raises:
        ValueError: fewer than two blocks.
    """
    if depth < 2:
        raise ValueError(f"LayerSync needs a model of at least 2 blocks, got depth {depth}")
    if depth in _PUBLISHED_PAIRS:
        return _PUBLISHED_PAIRS[depth]
    student = max(1, round(0.31 * depth))
    return student, max(student + 1, round(0.66 * depth))


def distinct_pairs(loss: str, what: str, pairs: Iterable[tuple[Block, Block]]) -> tuple[tuple[Block, Block], ...]:
    """The pairs of a loss, their blocks names or Python's integers.

    Args:
        loss: its name, for messages.
        what: it takes, for messages.
        pairs: as they were given.

    Raises:
        ValueError: no pair, or one twice.
    """
    distinct = tuple((_as_block(student), _as_block(teacher)) for student, teacher in pairs)
    if not distinct:
        raise ValueError(f"{loss}: give at least one {what}")
    if len(set(distinct)) != len(distinct):
        given = ", ".join(map(pair_label, distinct))
        raise ValueError(f"{loss}: the same {what} is given twice in {given}; raise its weight instead")
    return distinct


def _as_block(block: Block) -> Block:
    return block if isinstance(block, str) else int(block)  # integers of NumPy are none that isinstance knows


def sorted_blocks(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Each once, numbers ascending, then names."""
    return tuple(sorted(set(blocks), key=lambda block: (isinstance(block, str), block)))


def pair_label(pair: tuple[Block, Block]) -> str:
    """The key of a pair in `cosine`: "block", or "block:teacher" where the pair names a teacher."""
    block, teacher = pair
    return str(block) if block == teacher else f"{block}:{teacher}"
