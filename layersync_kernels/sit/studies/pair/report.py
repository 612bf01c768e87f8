"""What a probe found, and the pair that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from torch import Tensor

from ....losses.pairs import default_pair
from ...console import console

PICTURE = "probe.png"
"""Name of the picture in a run's folder; the numbers lie beside it, as .json."""
CLEAR = 2.0
"""A difference counts from this many of its standard errors on."""
ALIKE = 0.9
"""A pair whose mean cosine is above this has little left to align."""


def noised(times: Sequence[float]) -> list[int]:
    """Which of the times are not clean; all of them where there is none."""
    return [i for i, time in enumerate(times) if time < 1] or list(range(len(times)))


def clean(times: Sequence[float]) -> int | None:
    """Which of the times is that of the clean sample, where there are noised ones beside it."""
    return list(times).index(1.0) if 1.0 in times and min(times) < 1 else None


@dataclass(frozen=True)
class Accuracy:
    """How well the labels are told from each block; all lists run over the blocks.

    Attributes:
        mean: share of held-out samples whose label is found, averaged over the noised times.
        standard_error: of `mean`, over held-out samples.
        per_time: the same at each time.
        chance: what naming the commonest label would reach.
    """

    mean: list[float]
    standard_error: list[float]
    per_time: list[list[float]]
    chance: float


@dataclass(frozen=True)
class Neighbours(Accuracy):
    """Votes of the nearest neighbours.

    Attributes:
        neighbours: how many vote.
    """

    neighbours: int


@dataclass(frozen=True)
class TeacherLikeness:
    """How alike blocks and a pretrained network, which saw the clean samples, tell them apart.

    Attributes:
        name: of the network.
        cka: (times, depth), see `linear_cka_to`.
    """

    name: str
    cka: list[list[float]]


@dataclass(frozen=True)
class Report:
    """The content of ``probe.json``.

    Attributes:
        checkpoint: what was measured.
        depth: number of blocks; everything per block is in their order.
        samples: how many were measured.
        held_out: how many of them the probes did not see.
        times: noise levels; 1 is the clean sample.
        accuracy: linear probes; None where the data has no labels.
        neighbours: see `neighbour_probe`; None where the data has no labels.
        effective_rank: (times, depth), of the tokens, see `effective_rank`.
        cosine: (depth, depth), see `States`; averaged over the noised times.
        cosine_per_time: (times, depth, depth).
        cka: (depth, depth), see `linear_cka`; averaged over the noised times.
        cka_per_time: (times, depth, depth).
        teacher: None where none was named.
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
    neighbours: Neighbours | None
    effective_rank: list[list[float]]
    cosine: list[list[float]]
    cosine_per_time: list[list[list[float]]]
    cka: list[list[float]]
    cka_per_time: list[list[list[float]]]
    teacher: TeacherLikeness | None
    pair: tuple[int, int]
    reason: str
    notes: list[str]


def teacher_range(depth: int) -> range:
    """The blocks that `propose_pair` lets teach: none of the last fifth (but at depth 2), and none so early that its
    student, at half its depth, would be less than a quarter of the model away.
    """
    return range(2 * -(-depth // 4), max(2, 4 * depth // 5) + 1)


def pairs_in_range(depth: int) -> list[tuple[int, int]]:
    """The pairs that keep to the rules of `propose_pair`: a teacher of `teacher_range`, and a student beyond the first
    fifth, at least a quarter of the model before it.
    """
    first, apart = depth // 5 + 1, -(-depth // 4)
    return [(student, teacher) for teacher in teacher_range(depth) for student in range(first, teacher - apart + 1)]


def cosine_note(pair: tuple[int, int], cosine: Sequence[Sequence[float]]) -> str | None:
    """What to bear in mind of a pair whose tokens are nearly parallel already; None where they are not.

    Args:
        pair: student and teacher, counted from 1.
        cosine: (depth, depth), of equal tokens.
    """

    def at(place: tuple[int, int]) -> float:
        return cosine[place[0] - 1][place[1] - 1]

    if at(pair) <= ALIKE:
        return None
    others = sorted((other for other in pairs_in_range(len(cosine)) if at(other) < at(pair)), key=at)[:3]
    lower = ", ".join(f"{student}:{teacher} ({at((student, teacher)):.3f})" for student, teacher in others)
    return f"the cosine of the pair {pair[0]}:{pair[1]} is {at(pair):.3f}, which leaves the loss little to do; " + (
        f"lower in the same range: {lower}" if lower else "no other pair in the same range has a lower one"
    )


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


def print_report(report: Report, name: str | None = None) -> None:
    """Shows the tables, the proposal and the notes on the terminal, under a name."""
    if name is not None:
        console.rule(name)
    at_clean, at_noise = clean(report.times), noised(report.times)
    if at_clean is None:
        console.print(_table(report, at_noise))
    else:
        levels = ", ".join(f"{report.times[i]:g}" for i in at_noise)
        console.print(_table(report, at_noise, f"noised input, mean over t = {levels}"))
        console.print(_table(report, [at_clean], "clean input, t = 1"))
    if report.accuracy is not None and report.neighbours is not None:
        console.print(
            f"probe and k-NN: {report.held_out} held-out samples, "
            f"{report.neighbours.neighbours} neighbours; chance {100 * report.accuracy.chance:.1f} %"
        )
    if report.teacher is not None:
        console.print(f"network: {report.teacher.name}, which saw the clean samples")
    student, teacher = report.pair
    console.print(f"proposed: --layersync {student}:{teacher} ({report.reason})")
    for note in report.notes:
        console.print(f"note: {note}")


def _table(report: Report, places: Sequence[int], title: str | None = None) -> Table:
    """Means over the times at these places."""
    student, teacher = report.pair
    columns = ["block", "probe, %", "k-NN, %", "rank", f"cosine\nto {teacher}", f"CKA\nto {teacher}"]
    network = [] if report.teacher is None else ["CKA to\nnetwork"]
    table = Table(*columns, *network, "", title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)

    def mean(per_time: Sequence[Sequence[float]], block: int) -> float:
        return sum(per_time[i][block] for i in places) / len(places)

    for block in range(report.depth):
        probe = neighbours = "-"
        if report.accuracy is not None and report.neighbours is not None:
            probe, neighbours = (
                f"{100 * mean(own.per_time, block):.1f}" for own in (report.accuracy, report.neighbours)
            )
            if list(places) == noised(report.times):
                probe += f" ± {100 * report.accuracy.standard_error[block]:.1f}"
        alike = [
            mean([matrix[teacher - 1] for matrix in matrices], block)
            for matrices in (report.cosine_per_time, report.cka_per_time)
        ]
        if report.teacher is not None:
            alike.append(mean(report.teacher.cka, block))
        role = {student: "student", teacher: "teacher"}.get(block + 1, "")
        rank = f"{mean(report.effective_rank, block):.1f}"
        table.add_row(str(block + 1), probe, neighbours, rank, *(f"{value:.3f}" for value in alike), role)
    return table
