"""LAYERSYNC_CPU_ISA: a cap on the instruction set of the CPU kernels, or a clear error."""

import os
import subprocess
import sys

import pytest
import torch

from layersync_kernels.ops import native

NAMES = ("generic", "avx2", "avx512")
CALL = """
import torch
from layersync_kernels import layersync_loss
from layersync_kernels.ops import native
layersync_loss(torch.ones(2, 3), torch.ones(2, 3), backend="cpp")
print(native.cpp().facts.cpu_isa())
"""

pytestmark = pytest.mark.skipif(not native.cpp().loaded, reason=native.cpp().reason)


def run_with(cap):
    environment = {**os.environ, "LAYERSYNC_CPU_ISA": cap}
    return subprocess.run([sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, check=False)


def test_a_cap_is_kept_and_one_above_the_machine_is_none():
    best = run_with("best").stdout.strip()
    capability = torch.backends.cpu.get_cpu_capability().lower()
    assert best == {"avx2": "avx2", "avx512": "avx512"}.get(capability, "generic")
    assert run_with("").stdout.strip() == best
    for cap in NAMES:
        assert run_with(cap).stdout.strip() == min(cap, best, key=NAMES.index)


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "avx"])
def test_an_unknown_instruction_set_is_an_error_that_names_it_and_the_known_ones(name):
    done = run_with(name)
    assert done.returncode != 0
    assert f"LAYERSYNC_CPU_ISA={name}; expected best, generic, avx2 or avx512" in done.stderr
