"""What an earlier call has left in the folder of results: whose it is, which stages are over, and who writes now."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...sit.files import atomic_path, write_json
from ..journal import now_path

STATE, RESULTS, TESTS, TUNING = "state.json", "results.jsonl", "tests.jsonl", "tune.json"
ENVIRONMENT, LOG = "environment.txt", "log.txt"
_VERSION = 1
_STATUSES = ("passed", "failed", "cut", "missing")


@dataclass
class Record:
    """How a stage ended.

    Attributes:
        status: "passed"; "failed"; "cut", by its limit, the end of the budget or a signal; "missing", what it needs is
            not here.
        seconds: of all its runs together.
        runs: how often it was started.
        reason: of "missing", or what else there is to say.
    """

    status: str
    seconds: float = 0.0
    runs: int = 0
    reason: str = ""


@dataclass
class State:
    """The content of state.json.

    Attributes:
        identity: card, versions and source that the results belong to.
        stages: name to record, of the stages that have been started.
    """

    identity: dict[str, str]
    stages: dict[str, Record] = field(default_factory=dict)

    def write(self, out: Path) -> None:
        """All of it or nothing, whatever happens."""
        write_json(out / STATE, {"version": _VERSION, **asdict(self)})


def _parse(content: Any) -> State:
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise ValueError(f"expected version {_VERSION} of the state")
    identity, stages = content.get("identity"), content.get("stages")
    if not isinstance(identity, dict) or not all(isinstance(value, str) for value in identity.values()):
        raise ValueError("identity: expected names and texts")
    if not isinstance(stages, dict):
        raise ValueError("stages: expected names and records")
    records = {}
    for name, entry in stages.items():
        try:
            record = Record(**entry)
            record.seconds, record.runs = float(record.seconds), int(record.runs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"stage {name!r}: {error}") from None
        if record.status not in _STATUSES:
            raise ValueError(f"stage {name!r}: status {record.status!r}; expected one of {', '.join(_STATUSES)}")
        records[name] = record
    return State(identity, records)


def _results(out: Path) -> list[Path]:
    names = (STATE, RESULTS, now_path(Path(RESULTS)).name, TESTS, TUNING, ENVIRONMENT, LOG)
    return [path for path in (out / name for name in names) if path.is_symlink() or path.exists()]


def set_aside(out: Path) -> Path | None:
    """Move earlier results into an archive beside them, aside-1.zip or the next number; None where there are none."""
    old = _results(out)
    if not old:
        return None
    number = 1
    while (out / f"aside-{number}.zip").exists():
        number += 1
    target = out / f"aside-{number}.zip"
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in old:
            if path.is_file():
                archive.write(path, path.name)
    for path in old:
        if path.is_dir() and not path.is_symlink():
            raise UserError(f"{path} is a folder; expected a file of results. Move it away, or give another --out")
        path.unlink()
    return target


def resume(out: Path, identity: Mapping[str, str], *, fresh: bool = False) -> tuple[State, str | None]:
    """The state to go on with, and what there is to say where that is a new one.

    Results of another card, of other versions or of another source are put aside; so are those of a state that cannot
    be read, and results without a state.
    """
    try:
        state = _parse(json.loads((out / STATE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        why = "results without a state" if _results(out) else None
    except (OSError, ValueError, RecursionError) as error:
        why = f"{STATE} cannot be read ({error})"
    else:
        other = [
            f"{name} {state.identity.get(name, 'none')}, here {identity.get(name, 'none')}"
            for name in sorted({*state.identity, *identity})
            if state.identity.get(name) != identity.get(name)
        ]
        why = f"the results are of {'; '.join(other)}" if other else None
        if why is None and not fresh:
            return state, None
    if fresh and _results(out):
        why = "begun anew"
    archive = set_aside(out)
    said = None if archive is None else f"{why}: what was there is in {archive.name}"
    return State(dict(identity)), said


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Hold the folder of results; the lock is the folder's own, leaves no file and ends with the process.

    Raises:
        UserError: another process holds it.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run writes to {out}; wait for it, or give another --out") from None
        yield
    finally:
        os.close(descriptor)
