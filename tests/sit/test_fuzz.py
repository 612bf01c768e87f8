"""Damaged files of every kind end as whole ones or with an error for the user: see `fuzz.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")

KINDS = ["npz", "latents", "features", "checkpoint", "state", "config", "records", "marks", "published"]
KINDS += ["png", "jpeg", "tiff"]
ALLOWED_MB = 300
"""A process may grow by this in all cases of a kind; --memory-limit-gb is 50 MB there."""


def run(count, *kinds):
    command = [sys.executable, "-m", "tests.sit.fuzz", str(count), *kinds]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | threads, capture_output=True, text=True)
    assert done.returncode == 0, f"it ended with {done.returncode} in:\n{done.stderr[-3000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found, count):
    assert found["failures"] == {}
    assert found["taken"] + found["refused"] == count
    assert found["taken"] > 0  # some damage is none, and shows that the cases reach as far as they should
    assert found["grown_mb"] < ALLOWED_MB


def test_some_damaged_files_of_every_kind():
    found = run(50)
    assert [one["kind"] for one in found] == KINDS
    for one in found:
        check(one, 50)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files(kind):
    (found,) = run(2000, kind)
    print(json.dumps(found))
    check(found, 2000)
