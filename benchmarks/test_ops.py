"""Every op by provider, case and mode, each checked against fp64 before it is timed.

pytest-benchmark runs the providers one after the other and keeps histories (`--benchmark-autosave`,
`--benchmark-compare`); for ratios inside one run use `layersync bench ops`, which interleaves them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from layersync_kernels.bench.cases import MODES, OPS, PROVIDERS, Case, cases, provider
from layersync_kernels.bench.engine import check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [case for op in OPS for case in cases(DEVICE, ops=(op,))[:2]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_op(benchmark: Any, case: Case, name: str, mode: str) -> None:
    """Time one mode of one provider; extra_info holds the bandwidth."""
    if mode not in case.modes:
        pytest.skip("nothing to differentiate")
    try:
        function = provider(name, case)
    except RuntimeError as error:
        pytest.skip(str(error))
    problem = check(case, function)
    assert problem is None, problem
    inputs = case.inputs(seed=0)
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None

    def forward() -> tuple[Tensor, ...]:
        outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    gradients = [torch.ones_like(x) for x in forward()]

    def setup() -> tuple[tuple[tuple[Tensor, ...] | None], dict[str, Any]]:
        for x in inputs:
            x.grad = None
        outputs = forward() if mode == "backward" else None
        synchronize()
        return (outputs,), {}

    def call(outputs: tuple[Tensor, ...] | None) -> None:
        outputs = forward() if outputs is None else outputs
        if mode != "forward":
            torch.autograd.backward(outputs, gradients)
        synchronize()

    benchmark.pedantic(call, setup=setup, rounds=10, warmup_rounds=2)
    ideal = case.ideal_bytes(mode)
    if benchmark.stats is not None and ideal is not None:  # no stats under --benchmark-disable
        benchmark.extra_info["GB/s"] = ideal / benchmark.stats.stats.median / 1e9
