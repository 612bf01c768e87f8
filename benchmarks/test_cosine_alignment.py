"""The alignment loss by provider, case and mode, each checked against fp64 before it is timed.

pytest-benchmark runs the providers one after the other and keeps histories (`--benchmark-autosave`,
`--benchmark-compare`); for ratios inside one run use `layersync bench`, which interleaves them.
"""

import pytest
import torch

from layersync_kernels.bench.cases import MODES, PROVIDERS, cases, provider
from layersync_kernels.bench.engine import check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("case", cases(DEVICE)[:2], ids=lambda case: case.name)
def test_loss(benchmark, case, name, mode):
    """Time one mode of one provider; extra_info holds the bandwidth."""
    try:
        loss = provider(name, case)
    except RuntimeError as error:
        pytest.skip(str(error))
    problem = check(case, loss)
    assert problem is None, problem
    student, teacher = case.inputs(seed=0)
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None

    def setup():
        student.grad = None
        synchronize()
        return (loss(student, teacher),) if mode == "backward" else (), {}

    def forward():
        loss(student, teacher)
        synchronize()

    def backward(value):
        value.backward()
        synchronize()

    def both():
        loss(student, teacher).backward()
        synchronize()

    call = {"forward": forward, "backward": backward, "both": both}[mode]
    benchmark.pedantic(call, setup=setup, rounds=10, warmup_rounds=2)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["GB/s"] = case.ideal_bytes(mode) / benchmark.stats.stats.median / 1e9
