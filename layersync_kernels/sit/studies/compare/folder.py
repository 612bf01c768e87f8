"""The folder of a comparison: its settings, and in ARM/seed-N a run for each arm and seed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....errors import CheckpointError, ConfigError
from ...checkpoints.local import newest_checkpoint
from ...checkpoints.state import read_run_state
from ...config.io import build, load_settings, parse_json, save_config
from ...config.paths import with_absolute_paths
from ...config.run import TrainConfig
from ...files import atomic_path, write_json
from ...training.folder import check_sources, is_empty, replace_folder
from .config import SETTINGS, CompareConfig

MARKS = "marks.json"
"""Name of the measurements in the folder of a run."""


@dataclass(frozen=True)
class Mark:
    """What `Run.marks` have to hold; numbers under other names come from the trainer, and may be NaN."""

    step: int
    seconds: float
    validation_loss: float
    frechet: float | None
    frechet_floor: float | None = None
    frechet_dimensions: int | None = None
    teacher: str | None = None
    teacher_share: float | None = None
    blocks: Any = None

    def __post_init__(self) -> None:
        if self.step < 0 or not 0 <= self.seconds < math.inf:
            raise ValueError(f"step is {self.step} and seconds {self.seconds}; expected 0 or more")
        for value in (self.validation_loss, self.frechet, self.frechet_floor):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"a quality is {value}; expected a number")


@dataclass
class Run:
    """One arm with one seed.

    Attributes:
        marks: what was measured, in order, each a `Mark` as JSON values, with what the trainer reports about the steps
            since the mark before.
    """

    arm: str
    seed: int
    folder: Path
    config: TrainConfig
    marks: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> None:
        """Fills `marks` from the folder; those that the newest whole checkpoint does not know yet are left out.

        Raises:
            CheckpointError: the marks or all checkpoints are damaged.
        """
        checkpoint, path = newest_checkpoint(self.folder), self.folder / MARKS
        self.marks = []
        if checkpoint is not None and path.is_file():
            step = read_run_state(checkpoint).step
            try:
                self.marks = [mark for mark in read_marks(path) if mark["step"] <= step]
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot read {path}: {error}; remove {self.folder}") from error

    def add(self, mark: dict[str, Any]) -> None:
        """Appends a mark, on the disk too."""
        self.marks.append(mark)
        with writing():
            write_json(self.folder / MARKS, self.marks)


def read_marks(path: Path) -> list[dict[str, Any]]:
    """Marks as they were written.

    Raises:
        ValueError: one is no `Mark`, or they are not in order.
        OSError: the file cannot be read.
    """
    marks = parse_json(path.read_bytes(), nan=True)
    if not isinstance(marks, list):
        raise ValueError(f"expected a list of marks, found {type(marks).__name__}")
    steps = [build(Mark, mark, f"mark {number}: ", others=float).step for number, mark in enumerate(marks)]
    if steps != sorted(steps):
        raise ValueError("its marks are not in the order of their steps")
    return marks


def check_folder(config: CompareConfig, out: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes sure that a comparison may use the folder, and touches nothing.

    Raises:
        ConfigError: it holds a comparison with other settings (more seeds may be asked for) and not `overwrite`, it
            holds something else, there is nothing to `resume`, or what `config` reads lies in a folder that is to be
            deleted.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    path = out / SETTINGS
    if path.is_file():
        if overwrite:
            check_sources(config, out)
            return
        before = with_absolute_paths(load_settings(path, CompareConfig))
        same = dataclasses.replace(config, seeds=before.seeds) if config.seeds > before.seeds else config
        if different := list(_differences(dataclasses.asdict(before), dataclasses.asdict(same))):
            raise ConfigError(
                f"{out} was begun with other settings: {'; '.join(different)}; choose another --out, --overwrite it, "
                "or go on there with --resume and no other flag"
            )
    elif resume:
        raise ConfigError(f"{out} is not a comparison to resume: it has no {SETTINGS}")
    elif not is_empty(out):
        raise ConfigError(f"{out} exists and is not a comparison (it has no {SETTINGS}); choose another --out")


def start_folder(config: CompareConfig, out: Path, *, overwrite: bool) -> None:
    """Makes the folder that `check_folder` has passed, anew if `overwrite`, and writes the settings into it.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing():
        if overwrite and not is_empty(out):
            replace_folder(out, lambda folder: save_config(config, folder / SETTINGS))
        else:
            with atomic_path(out / SETTINGS) as temporary:
                save_config(config, temporary)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turns what a full or read-only disk raises into an error for the user."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write the comparison: {error}") from error


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A line for each setting that is another one now, by its flag."""
    for name, value in before.items():
        if isinstance(value, dict):
            yield from _differences(value, now[name], name.removesuffix("when") if name.endswith("when") else "")
        elif value != now[name]:
            yield f"--{(prefix + name).replace('_', '-')} was {value}, now {now[name]}"
