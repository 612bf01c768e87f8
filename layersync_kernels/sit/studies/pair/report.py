"""What a probe found, and the pair that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table
from torch import Tensor

from ....losses.pairs import default_pair
from ...console import console

PICTURE = "probe.png"
"""Name of the picture in a run's folder; the numbers lie beside it, as .json."""
CLEAR = 2.0
"""A difference counts from this many of its standard errors on."""


@dataclass(frozen=True)
class Accuracy:
    """Linear probes of the labels; all lists run over the blocks.

    Attributes:
        mean: share of held-out samples whose label is found, averaged over the times.
        standard_error: of `mean`, over held-out samples.
        per_time: the same at each time.
        chance: what naming the commonest label would reach.
    """

    mean: list[float]
    standard_error: list[float]
    per_time: list[list[float]]
    chance: float


@dataclass(frozen=True)
class Report:
    """The content of ``probe.json``.

    Attributes:
        checkpoint: what was measured.
        depth: number of blocks; everything per block is in their order.
        samples: how many were measured.
        held_out: how many of them the probes did not see.
        times: noise levels.
        accuracy: None where the data has no labels.
        cosine: (depth, depth), see `States`.
        cka: (depth, depth), see `linear_cka`; averaged over the times.
        pair: the proposed student and teacher, counted from 1.
        reason: why this pair.
        notes: what to bear in mind.
    """

    checkpoint: str
    depth: int
    samples: int
    held_out: int
    times: list[float]
    accuracy: Accuracy | None
    cosine: list[list[float]]
    cka: list[list[float]]
    pair: tuple[int, int]
    reason: str
    notes: list[str]


def teacher_range(depth: int) -> range:
    """The blocks that `propose_pair` lets teach: none of the last fifth (but at depth 2), and none so early that its
    student, at half its depth, would be less than a quarter of the model away.
    """
    return range(2 * -(-depth // 4), max(2, 4 * depth // 5) + 1)


def propose_pair(depth: int, scores: Tensor | None) -> tuple[tuple[int, int], str]:
    """A (student, teacher) pair and the reason for it.

    The teacher is the block of `teacher_range` whose probe is best, if it beats the teacher of `default_pair` by more
    than two standard errors of the difference, sample by sample. The student then lies at half the teacher's depth,
    rounded up, as in the published pairs to within one block (8:16, 8:18, 9:17): never in the first fifth of a model of
    6 blocks or more. Else, and without labels, it is the default pair.

    Args:
        depth: number of blocks, at least 2.
        scores: (depth, M), how well each block's probe does on each of M held-out samples; None without labels.
    """
    default = default_pair(depth)
    if scores is None:
        return default, f"without labels nothing tells the blocks apart: the default pair for depth {depth}"
    candidates = teacher_range(depth)
    means = scores.double().mean(1)
    best = max(candidates, key=lambda block: float(means[block - 1]))
    if len(candidates) == 1:
        choice = f"block {best} is the only one that may teach at depth {depth}"
    else:
        choice = f"block {best} has the best probe of those that may teach ({candidates[0]} to {candidates[-1]})"
    if best == default[1]:
        return default, f"{choice}, and it is the default pair's teacher"
    gain, error = paired_difference(scores, best, default[1])
    choice += f", {100 * gain:.1f} ± {100 * error:.1f} points above the default pair's teacher, block {default[1]}"
    if gain <= CLEAR * error:
        return default, f"the probes do not separate the blocks, so the default pair: {choice}"
    return (-(-best // 2), best), f"{choice}; the student is at half its depth"


def paired_difference(scores: Tensor, first: int, second: int) -> tuple[float, float]:
    """By how much one block's probe is better than another's, and the standard error: both saw the same samples."""
    difference = scores[first - 1].double() - scores[second - 1].double()
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


def print_report(report: Report) -> None:
    """Shows the table, the proposal and the notes on the terminal."""
    student, teacher = report.pair
    table = Table("block", "probe, %", f"cosine to {teacher}", f"CKA to {teacher}", "")
    for i in range(report.depth):
        probe = "-"
        if report.accuracy is not None:
            probe = f"{100 * report.accuracy.mean[i]:.1f} ± {100 * report.accuracy.standard_error[i]:.1f}"
        role = {student: "student", teacher: "teacher"}.get(i + 1, "")
        alike = (f"{matrix[i][teacher - 1]:.3f}" for matrix in (report.cosine, report.cka))
        table.add_row(str(i + 1), probe, *alike, role)
    console.print(table)
    if report.accuracy is not None:
        console.print(
            f"probe: mean over t = {', '.join(map(str, report.times))} and {report.held_out} held-out samples; "
            f"chance {100 * report.accuracy.chance:.1f} %"
        )
    console.print(f"proposed: --layersync {student}:{teacher} ({report.reason})")
    for note in report.notes:
        console.print(f"note: {note}")
