"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from layersync_kernels.runtime.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("unsupported"); sys.exit()
def allocate():
    blocks = [torch.ones(5 << 20, dtype=torch.uint8) for _ in range(20)]
allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_steps_of_a_steady_shape_fault_no_pages_in():
    kept, given_back = (
        subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout.strip()
        for how in ("keep", "default")
    )
    if kept == "unsupported":
        pytest.skip("the C library is not glibc")
    assert int(kept) < int(given_back) / 2
