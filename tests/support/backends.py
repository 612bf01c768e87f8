"""Which backends the tests of an op can run here, on which device, with which layouts, and how exact they must be."""

import functools
import os
import subprocess
import sys

import pytest
import torch

from layersync_kernels.ops import dispatch, native

from .emulation import EMULATED

HAS_GPU = torch.cuda.is_available()


def device_of(backend):
    on_gpu = {"cuda": not EMULATED, "triton": HAS_GPU}
    return "cuda" if on_gpu.get(backend) else "cpu"


def mark(backend):
    """A backend for `parametrize`, skipped where its kernels cannot run."""
    reasons = []
    if backend == "library":
        pass
    elif backend == "cuda":
        if not EMULATED:
            reasons.append(pytest.mark.gpu)
        if HAS_GPU:
            native.cuda()  # as `dispatch` does, which a test of a raw op has not asked
    else:
        try:
            dispatch.choose("cosine_alignment", backend, device_of(backend), torch.float32)
        except RuntimeError as error:  # a build without a compiler, tested by tests/build/test_build.py
            reasons.append(pytest.mark.skip(reason=str(error)))
    return pytest.param(backend, marks=reasons)


FUSED = [mark(backend) for backend in ("cpp", "triton", "cuda")]
ALL = [*FUSED, "reference"]


def each_backend(values, interpreted):
    """Pairs of backend and value for `parametrize`: of many cases Triton's interpreter, which is slow, takes a few."""
    return [
        pytest.param(backend.values[0], value, marks=backend.marks)
        for backend in FUSED
        for value in values
        if HAS_GPU or backend.values[0] != "triton" or value in interpreted
    ]


# Layouts of tokens (B, N, D) that rows at two strides cover.
STRIDED = {
    "without the class token": lambda x: torch.cat([x[:, :1], x], dim=1)[:, 1:],
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "slice of wider channels": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "every other token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "one token for all": lambda x: x[:, :1].expand_as(x),
}


def moved(x, device):
    """`x` on a device. A view with gaps keeps its strides, where `.to` would close the gaps."""
    if x.device.type == torch.device(device).type or x.is_contiguous():
        return x.to(device)
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


LOWER_INSTRUCTION_SETS = [pytest.param("generic", marks=pytest.mark.slow), "avx2"]
"""Below that of the machine; the portable loops take as long as all others together."""


def results_of(function, inputs, backend, grad=None, **options):
    """Output and gradients of a call by name, on fresh leaves that keep the strides; `grad`: of the output, or ones."""
    device = device_of(backend)
    leaves = {n: None if t is None else moved(t.detach(), device).requires_grad_() for n, t in inputs.items()}
    output = function(*leaves.values(), backend=backend, **options)
    wanted = {n: leaf for n, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(
        output, list(wanted.values()), torch.ones_like(output) if grad is None else moved(grad, device).to(output)
    )
    results = {"output": output} | {f"d_{n}": g for n, g in zip(wanted, gradients, strict=True)}
    return {n: result.detach().cpu() for n, result in results.items()}


def checkpointed_gradients(function, inputs, backend, use_reentrant):
    """Those of a call under a checkpoint, by name, for a gradient of ones."""
    leaves = {n: t.to(device_of(backend)).requires_grad_() for n, t in inputs.items()}
    call = functools.partial(function, backend=backend)
    output = torch.utils.checkpoint.checkpoint(call, *leaves.values(), use_reentrant=use_reentrant)
    output.backward(torch.ones_like(output))
    return {f"d_{n}": leaf.grad.cpu() for n, leaf in leaves.items()}


def run_on_lower_instruction_set(isa, file, tests):
    """Run tests of a file (an expression as for pytest's -k) in a process that the CPU kernels of `isa` serve.

    The kernels are chosen at run time; a machine with AVX-512 must not leave the other two untested.
    """
    environment = {**os.environ, "LAYERSYNC_CPU_ISA": isa}
    facts = subprocess.run(
        [sys.executable, "-c", "from layersync_kernels.ops import native; print(native.cpp().facts.cpu_isa())"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if facts.stdout.strip() != isa:
        pytest.skip(f"this machine has no {isa} kernels: {facts.stdout or facts.stderr}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", tests]
    report = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stdout[-3000:]


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
