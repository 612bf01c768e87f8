"""What a file of rows holds already, so that a run that was cut short goes on where it ended."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cases import Case
from .engine import Row
from .machine import same_machine
from .report import append_json, read_json


def now_path(path: Path) -> Path:
    """Where the case that is being measured is named: what is still there when a run begins has killed its process."""
    return path.with_name(f"{path.name}.now")


class Journal:
    """The rows of one machine in a file.

    Args:
        path: the file, as `append_json` writes it.
        facts: of `machine_facts`. Rows of other machines, versions or sources count for nothing.
    """

    def __init__(self, path: Path, facts: Mapping[str, str]) -> None:
        self._path, self._facts = path, dict(facts)
        self.rows: list[dict[str, Any]] = [row for row in read_json(path) if same_machine(row.get("machine"), facts)]
        fields = ("op", "case", "device", "mode", "provider")
        self._done = {tuple(row.get(field) for field in fields) for row in self.rows}

    def modes_left(self, case: Case, providers: Sequence[str], modes: Sequence[str]) -> list[str]:
        """The modes that lack a row; all of one are measured together, since their ratios are of the same rounds."""

        def done(mode: str) -> bool:
            return all((case.op, case.name, case.device, mode, name) in self._done for name in providers)

        return [mode for mode in modes if mode in case.modes and not done(mode)]

    @contextlib.contextmanager
    def measuring(self, case: Case) -> Iterator[None]:
        """Name the case while it is measured. An exception is no death: the case is taken up again."""
        place = now_path(self._path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps([case.op, case.name, case.device]))
        try:
            yield
        finally:
            place.unlink(missing_ok=True)

    def bury(self, case: Case, providers: Sequence[str], modes: Sequence[str]) -> list[Row]:
        """If the case has killed the process before this one: the rows that say so, which are written, else none."""
        place = now_path(self._path)
        try:
            killer = json.loads(place.read_text())
        except (OSError, ValueError):
            return []
        if killer != [case.op, case.name, case.device]:
            return []
        problem = "the process that measured this case died"
        rows = [
            Row(case.op, case.name, mode, name, case.device, problem=problem, machine=self._facts)
            for mode in modes
            for name in providers
        ]
        append_json((row.as_dict() for row in rows), self._path)
        place.unlink()
        return rows
