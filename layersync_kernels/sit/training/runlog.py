"""What a run says: progress bar, ``metrics.jsonl``, curves, and what other trackers take."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from torch import Tensor

from ...errors import CheckpointError
from ..checkpoints.local import FOLDER, newest_checkpoint
from ..config.io import build, parse_json
from ..console import console
from ..distributed.processes import ALONE, Processes
from ..files import atomic_path
from .curves import save_curves
from .trackers import Tracker, surviving_full_disk

logger = logging.getLogger(__name__)


RECORDS = "metrics.jsonl"
CURVES = "curves.png"


class Meter:
    """Means of 0-d tensors over many steps, kept on their device: `read` synchronises once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Adds one detached 0-d value."""
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, processes: Processes = ALONE) -> dict[str, float]:
        """The means since the last call, over processes too, and starts anew."""
        if not self._sums:
            return {}
        values = processes.mean(torch.stack(list(self._sums.values()))).tolist()
        means = {name: value / self._counts[name] for name, value in zip(self._sums, values, strict=True)}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self, processes: Processes = ALONE) -> dict[str, tuple[float, int]]:
        """Sum and count by name, for a checkpoint: the mean after a resume is over all steps, too. Synchronises.

        Sums are means over processes, with which any number of them can go on.

        Sums that are not finite are left out, as those of the gradient's norm where fp16 overflowed: JSON has no number
        for them.
        """
        values = processes.mean(torch.stack(list(self._sums.values()))).tolist() if self._sums else []
        sums = dict(zip(self._sums, values, strict=True))
        return {name: (total, self._counts[name]) for name, total in sums.items() if math.isfinite(total)}

    def load_state_dict(self, state: Mapping[str, tuple[float, int]], device: torch.device) -> None:
        """Goes on from there."""
        self._sums = {name: torch.tensor(total, device=device) for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}


@dataclass(frozen=True)
class Record:
    """A line of ``metrics.jsonl``. Under other names it holds finite numbers: losses and metrics of terms."""

    step: int
    loss: float
    cosine: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step is {self.step}; expected 0 or more")


def _read_record(line: bytes) -> dict[str, Any]:
    """A record as it was written; raises ValueError where the line is none."""
    values = parse_json(line)
    build(Record, values, others=float)
    numbers = (value for value in (*values.values(), *values.get("cosine", {}).values()) if isinstance(value, float))
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is infinite")
    return values


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, see `Record`; lines that are none, as a crash or a full disk leaves them, are left out.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = run_dir / RECORDS
    if not path.is_file():
        return []
    records, reasons = [], []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    records.append(_read_record(line))
                except ValueError as error:
                    reasons.append(f"line {number}: {error}")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if reasons:
        logger.warning("%s: %d lines are no records and are left out (%s)", path, len(reasons), reasons[0])
    return records


def checkpoint_to_resume(run_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, see `newest_checkpoint`; None for a run that has recorded no step either.

    Raises:
        DamagedCheckpoint: all are damaged.
        CheckpointError: there is none, of a run that has come further than that.
    """
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None and (step := max((record["step"] for record in read_records(run_dir)), default=0)):
        raise CheckpointError(
            f"{run_dir} has records up to step {step}, but no checkpoint to go on from: bring {run_dir / FOLDER} back "
            "from a copy, or begin anew with --overwrite"
        )
    return checkpoint


class RunLog:
    """Writes what a run reports to the terminal and to its folder.

    Args:
        run_dir: folder of the run, or None for the terminal alone.
        step: where the run goes on; records beyond it (of an attempt that came further than its last checkpoint) go.
        steps: where it ends.
        trackers: that take the records too; they are closed with this.
        rows: show each record as a line; else one in ten seconds, or the bar of a terminal alone.

    Raises:
        CheckpointError: the records cannot be read or written; they are as they were.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        step: int,
        steps: int,
        trackers: Sequence[Tracker] = (),
        rows: bool = False,
    ) -> None:
        self.run_dir, self._rows = run_dir, rows
        self._steps = steps
        self._trackers = trackers
        self._last_line = time.monotonic()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("step {task.fields[step]}/{task.fields[steps]}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[facts]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=1.0, step=step, steps=steps, facts="")
        if run_dir:
            _trim_records(run_dir, step)

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._progress.stop()
        for tracker in self._trackers:
            tracker.close(failed=error is not None)

    def advance(self, step: int, fraction: float) -> None:
        """Moves the bar; reads nothing from the device."""
        self._progress.update(self._task, completed=fraction, step=step)

    def record(self, record: Mapping[str, Any], *, seconds_left: float) -> None:
        """Writes one record ("step", "loss", "samples_per_second", "cosine": {pair: value}, ...) everywhere."""
        facts = [f"{record['samples_per_second']:.0f} samples/s", f"loss {record['loss']:.4f}"]
        facts += [f"cos {pair} {value:.3f}" for pair, value in record.get("cosine", {}).items()]
        facts.append(f"{_clock(seconds_left)} left")
        self._progress.update(self._task, facts="  ".join(facts))
        due = time.monotonic() - self._last_line > 10 or record["step"] >= self._steps
        if self._rows or (due and not console.is_terminal):
            self._last_line = time.monotonic()
            logger.info("step %d/%d  %s", record["step"], self._steps, "  ".join(facts))
        if self.run_dir is None:
            return
        with surviving_full_disk(RECORDS):
            _append(self.run_dir / RECORDS, json.dumps(record) + "\n")
        values = {name: value for name, value in record.items() if name not in ("step", "cosine")}
        values |= {f"cosine/{pair}": value for pair, value in record.get("cosine", {}).items()}
        for tracker in self._trackers:
            tracker.write(values, record["step"])

    def draw_curves(self) -> Path | None:
        """Redraws ``curves.png`` from the records so far."""
        if self.run_dir and (records := read_records(self.run_dir)):
            with surviving_full_disk(CURVES):
                return save_curves(records, self.run_dir / CURVES)
        return None


def _trim_records(run_dir: Path, step: int) -> None:
    """Leaves the records up to `step` alone, and touches nothing where that is so.

    Raises:
        CheckpointError: the file cannot be written; it is as it was.
    """
    path = run_dir / RECORDS
    kept = "".join(json.dumps(record) + "\n" for record in read_records(run_dir) if record["step"] <= step).encode()
    try:
        if path.is_file() and path.read_bytes() == kept:
            return
        with atomic_path(path) as temporary:
            temporary.write_bytes(kept)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; nothing is lost: make room, and resume") from error


def _append(path: Path, line: str) -> None:
    """Adds a line, or nothing: half a line would spoil the next one, too."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        content = line.encode()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
