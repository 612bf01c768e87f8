"""Which backends the tests of an op can run here, on which device, and how exact they must be."""

import pytest
import torch

from layersync_kernels.ops import _dispatch

HAS_GPU = torch.cuda.is_available()


def device_of(backend):
    return "cuda" if backend == "cuda" or (backend == "triton" and HAS_GPU) else "cpu"


def _mark(backend):
    reasons = []
    if backend == "cuda":
        reasons.append(pytest.mark.gpu)
    else:
        try:
            _dispatch.choose(backend, device_of(backend), torch.float32)
        except RuntimeError as error:  # a build without a compiler, tested by tests/test_build.py
            reasons.append(pytest.mark.skip(reason=str(error)))
    return pytest.param(backend, marks=reasons)


FUSED = [_mark(backend) for backend in ("cpp", "triton", "cuda")]
ALL = [*FUSED, "reference"]


def assert_as_exact_as(actual, baseline, truth, *, terms=0.0, factor=2.0, ulps=4.0):
    """A kernel may be twice as far from the fp64 truth as PyTorch in the same dtype, plus a few ulp.

    The floor is `ulps` units in the last place of `actual.dtype` at the magnitude of the largest true value, as
    PyTorch's own error can be zero by luck and rounding the result once already costs half an ulp; and of fp32 at the
    magnitude of the largest of the `terms` that were subtracted on the way, where the true value is what their
    cancellation left.
    """
    assert actual.shape == truth.shape
    truth = truth.double()
    error = (actual.double() - truth).abs().max().item() if actual.numel() else 0.0
    allowed = (baseline.double() - truth).abs().max().item() if actual.numel() else 0.0
    scale = truth.abs().max().item() if actual.numel() else 0.0
    limit = factor * allowed + ulps * (torch.finfo(actual.dtype).eps * scale + torch.finfo(torch.float32).eps * terms)
    assert error <= limit, f"error {error:.3g} > {limit:.3g} (PyTorch's own: {allowed:.3g}, largest value {scale:.3g})"
