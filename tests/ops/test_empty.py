"""Tensors without elements, whose channels are not dense: no op may crash, hang or raise."""

import subprocess
import sys
from pathlib import Path

import pytest

from layersync_kernels import functional

from ..support.backends import ALL, device_of
from .empty_calls import CALLS


def test_every_op_is_called():
    assert {call.partition(" ")[0] for call in CALLS} == set(functional.__all__) - {"Seam", "Tap"}


@pytest.mark.parametrize("backend", ALL)
def test_no_op_crashes_on_nothing(backend):
    command = [sys.executable, "-m", "tests.ops.empty_calls", backend, device_of(backend)]
    report = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=300
    )
    lines = report.stdout.splitlines()
    assert report.returncode == 0, report.stderr
    assert len(lines) >= len(CALLS), report.stdout
    assert [line for line in lines if not line.endswith(": ended")] == [], report.stdout + report.stderr
