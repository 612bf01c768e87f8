"""A pytest plugin that writes down each test as it ends, and passes over those that are written down.

`python -m pytest -p layersync_kernels.bench.card.record_tests --record FILE`. A test that was running when its process
died counts as failed, and so is not what the next process dies of; one that was interrupted runs again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
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
        config.pluginmanager.register(
            _Recording(config, path, config.getoption("--record-retry")), "layersync-recording"
        )


class _Recording:
    """Of a process that runs tests, or of the one that pytest-xdist's workers report to: that one writes."""

    def __init__(self, config: pytest.Config, path: Path, retry: bool) -> None:
        self._path, self._retry = path, retry
        self._is_worker = hasattr(config, "workerinput")
        self._has_workers = getattr(config.option, "numprocesses", None) is not None and not self._is_worker
        # All workers of a session pass over the same, those too that take the place of one that has died.
        self._earlier = config.workerinput["earlier"] if self._is_worker else outcomes(path)  # type: ignore[attr-defined]
        self._known: dict[str, str] = {}  # outcomes of the tests that are asked for, of this run and of earlier ones
        self._running: dict[str, tuple[float, str]] = {}  # since when, and the outcome so far

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        again = ("failed", "died") if self._retry else ()
        mine = {item.nodeid for item in items}
        for test, outcome in self._earlier.items():
            if test in mine and outcome not in again:
                self._known[test] = outcome
        if self._is_worker:
            config.workeroutput["known"] = dict(self._known)  # type: ignore[attr-defined]
        done = [item for item in items if item.nodeid in self._known]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self._known]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """A worker begins."""
        node.workerinput["earlier"] = self._earlier

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker has ended: what it has passed over counts here."""
        self._known = {**getattr(node, "workeroutput", {}).get("known", {}), **self._known}

    def _write(self, test: str, outcome: str, **more: object) -> None:
        if not self._is_worker:
            append_json([{"test": test, "outcome": outcome, **more}], self._path)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running[nodeid] = time.monotonic(), "passed"
        self._write(nodeid, "started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        began, outcome = self._running.get(report.nodeid, (time.monotonic(), "passed"))
        if report.failed or (report.skipped and outcome == "passed"):
            self._running[report.nodeid] = began, report.outcome
        if report.when not in ("setup", "call", "teardown"):  # pytest-xdist's word of a worker that has died
            self.pytest_runtest_logfinish(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        began, outcome = self._running.pop(nodeid)
        self._write(nodeid, outcome, seconds=round(time.monotonic() - began, 3))
        self._known[nodeid] = outcome
        if outcome == "failed" and not self._is_worker and not self._has_workers and _lost():
            pytest.exit(f"{nodeid} has left the device unusable", returncode=DEVICE_LOST)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if self._is_worker and report.failed and _lost():
            print(f"{report.longreprtext}\n{item.nodeid} has left the device unusable", file=sys.__stderr__, flush=True)
            os._exit(DEVICE_LOST)  # while this test runs, so that no other takes the blame; another worker goes on
        return report

    def pytest_keyboard_interrupt(self, excinfo: Any) -> None:
        if isinstance(excinfo.value, KeyboardInterrupt):
            for test in self._running:
                self._write(test, "interrupted")
            self._running.clear()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        failed = [test for test, outcome in self._known.items() if outcome in ("failed", "died")]
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and self._known:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if failed else pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        counts = dict.fromkeys(("passed", "failed", "died", "skipped"), 0)
        for outcome in self._known.values():
            counts[outcome] = counts.get(outcome, 0) + 1
        said = [f"{count} {outcome}" for outcome, count in counts.items() if count]
        terminalreporter.write_line(f"with earlier runs: {', '.join(said) or 'none'}")


def _lost() -> bool:
    return device_lost("cuda" if torch.cuda.is_available() else "cpu")
