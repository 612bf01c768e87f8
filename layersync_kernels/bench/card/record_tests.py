"""A pytest plugin that writes down each test as it ends, and passes over those that are written down.

`python -m pytest -p layersync_kernels.bench.card.record_tests --record FILE`. A test that was running when its process
died counts as failed, and so is not what the next process dies of; one that was interrupted runs again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ..engine import DEVICE_LOST, device_lost
from ..report import append_json, read_json


def outcomes(path: Path) -> dict[str, str]:
    """Test to its last outcome: "passed", "failed", "skipped", or "died"; those that were interrupted are left out."""
    found: dict[str, str] = {}
    for row in read_json(path):
        if isinstance(row.get("test"), str) and isinstance(row.get("outcome"), str):
            found[row["test"]] = row["outcome"].replace("started", "died")
    return {test: outcome for test, outcome in found.items() if outcome != "interrupted"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this plugin."""
    group = parser.getgroup("record")
    group.addoption("--record", type=Path, metavar="FILE", help="write each test's outcome here, and do not repeat it")
    group.addoption("--record-retry", action="store_true", help="repeat those that have failed")


def pytest_configure(config: pytest.Config) -> None:
    """Only with --record."""
    path = config.getoption("--record")
    if path is not None:
        config.pluginmanager.register(_Recording(path, config.getoption("--record-retry")), "layersync-recording")


class _Recording:
    def __init__(self, path: Path, retry: bool) -> None:
        self._path, self._retry = path, retry
        self._known: dict[str, str] = {}
        self._running: str | None = None
        self._outcome, self._began = "passed", 0.0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        again = ("failed", "died") if self._retry else ()
        earlier = outcomes(self._path)
        mine = {item.nodeid for item in items}
        self._known = {test: outcome for test, outcome in earlier.items() if test in mine and outcome not in again}
        done = [item for item in items if item.nodeid in self._known]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self._known]

    def _write(self, test: str, outcome: str, **more: object) -> None:
        append_json([{"test": test, "outcome": outcome, **more}], self._path)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running, self._outcome, self._began = nodeid, "passed", time.monotonic()
        self._write(nodeid, "started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._outcome = "failed"
        elif report.skipped and self._outcome == "passed":
            self._outcome = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write(nodeid, self._outcome, seconds=round(time.monotonic() - self._began, 3))
        self._known[nodeid] = self._outcome
        self._running = None
        if self._outcome == "failed" and device_lost("cuda" if torch.cuda.is_available() else "cpu"):
            pytest.exit(f"{nodeid} has left the device unusable", returncode=DEVICE_LOST)

    def pytest_keyboard_interrupt(self, excinfo: Any) -> None:
        if self._running is not None and isinstance(excinfo.value, KeyboardInterrupt):
            self._write(self._running, "interrupted")
            self._running = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        failed = [test for test, outcome in self._known.items() if outcome in ("failed", "died")]
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and self._known:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if failed else pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        counts = dict.fromkeys(("passed", "failed", "died", "skipped"), 0)
        for outcome in self._known.values():
            counts[outcome] = counts.get(outcome, 0) + 1
        said: Sequence[str] = [f"{count} {outcome}" for outcome, count in counts.items() if count]
        terminalreporter.write_line(f"with earlier runs: {', '.join(said) or 'none'}")
