"""Shared fixtures. Must run before Triton is imported: without a GPU its kernels go through the interpreter."""

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ["LAYERSYNC_TUNING"] = "off"  # a table of the user's would change what "auto" takes

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--write-matrix", type=Path, metavar="PATH", help="write the table of tests/integrate/test_matrix.py to PATH"
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fresh memory holds NaN, so that a kernel that leaves an output unwritten shows."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


# Tests of a folder that share what takes long to make; each goes to one worker as a whole, the longest first.
_TOGETHER = (
    "tests/build", "tests/cuda_emulation", "tests/integrate/test_matrix.py", "tests/bench/test_card.py",
    "tests/integrate/test_projector_distributed.py", "tests/sit/test_trajectories.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before xdist asks for the groups
def pytest_collection_modifyitems(items):
    for item in items:
        for place in _TOGETHER:
            if item.nodeid.startswith(place):
                item.add_marker(pytest.mark.xdist_group(place))
    items.sort(key=lambda item: not item.nodeid.startswith(_TOGETHER))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    """Groups that have no effect cost a third of the time, and nothing else shows it."""
    grouped = [test for test in ids if test.startswith(_TOGETHER)]
    if node.config.getoption("dist") == "loadgroup" and not all("@" in test for test in grouped):
        pytest.exit("pytest-xdist does not group tests under this pytest: pip install 'pytest<9.2'", returncode=4)
