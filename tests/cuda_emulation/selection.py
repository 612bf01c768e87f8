"""A plugin of pytest for the process of launchers.py: keeps the tests of the backend "cuda", and reports as it goes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from layersync_kernels.ops import dispatch

from . import launchers

REPORT = "LAYERSYNC_EMULATION_REPORT"  # the variable with the path of the report, if one is wanted
BY_AUTO = ("tests/ops/test_transforms.py",)  # whose backend is what "auto" takes, and no parameter
NOT_HERE = {
    "tests/ops/test_block_ops_gpu.py": "streams, graphs, profiles and memory of a card",
    "tests/ops/test_cosine_alignment_gpu.py": "streams, graphs, profiles and memory of a card",
    "tests/ops/test_gram_alignment.py::TestOnACard": "graphs of a card",
    "tests/ops/test_projected_alignment.py::test_graph_replays_with_new_inputs": "graphs of a card",
    "tests/ops/test_dispatch.py": "what dispatch says of a GPU: here it is told otherwise",
    "tests/ops/test_tuning.py": "the same, by a table",
    "tests/ops/test_cosine_alignment.py::test_a_backend_that_cannot_run_says_why_and_what_could": "the same",
}
LAUNCHED = "tests/cuda_emulation/launched/"


def pytest_configure() -> None:
    launchers.serve()


def is_of_cuda(item: pytest.Item) -> bool:
    """Whether the test asks for the backend, or for what "auto" takes there, or looks at the launchers."""
    if item.nodeid.startswith((LAUNCHED, *BY_AUTO)):
        return True
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return "cuda" in [value for value in parameters if isinstance(value, str)]


@pytest.fixture(autouse=True)
def _auto_takes_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: here the library stands behind the CPU, where "auto" takes the C++ kernels."""
    if request.node.nodeid.startswith(BY_AUTO):
        monkeypatch.setattr(dispatch, "_environment_backend", "cuda")
        monkeypatch.setattr(dispatch, "_chosen", {})


def write(**line: str) -> None:
    if path := os.environ.get(REPORT):
        with Path(path).open("a") as report:
            report.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    existing = [item for item in items if is_of_cuda(item)]
    for item in existing:
        write(test=item.nodeid, outcome="exists")
    kept = [item for item in existing if not item.nodeid.startswith(tuple(NOT_HERE))]
    config.hook.pytest_deselected(items=list(set(items) - set(kept)))
    items[:] = kept


def pytest_runtest_logstart(nodeid: str) -> None:
    write(test=nodeid, outcome="started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        write(test=report.nodeid, outcome=report.outcome, text=str(report.longrepr or ""))
