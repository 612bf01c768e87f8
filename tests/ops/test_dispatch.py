"""Which backend runs, and that the choice explains itself."""

import os
import subprocess
import sys

import pytest
import torch

from layersync_kernels.ops import dispatch, native


@pytest.fixture
def libraries(monkeypatch):
    """Pretend that the compiled libraries are there or not."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_environment_backend", "auto")

    def pretend(*, cpp, cuda):
        monkeypatch.setattr(native, "cpp", lambda: native.Library(cpp, "not built: no compiler"))
        monkeypatch.setattr(native, "cuda", lambda: native.Library(cuda, "not built: no toolkit"))

    return pretend


@pytest.mark.parametrize(
    ("cpp", "cuda", "device", "expected", "reason"),
    [
        (True, True, "cpu", "cpp", "fastest"),
        (False, False, "cpu", "reference", "no compiler"),
        (True, True, "cuda", "cuda", "fastest"),
        (True, False, "cuda", "triton", "no toolkit"),
        (True, True, "mps", "reference", "the tensors are on mps"),
    ],
)
def test_auto_takes_the_fastest_that_runs_and_says_why(libraries, cpp, cuda, device, expected, reason):
    libraries(cpp=cpp, cuda=cuda)
    choice = dispatch.choose("cosine_alignment", "auto", device, torch.bfloat16)
    assert choice.backend == expected
    assert reason in choice.reason


def test_fp64_takes_the_reference(libraries):
    libraries(cpp=True, cuda=True)
    for device in ("cpu", "cuda"):
        choice = dispatch.choose("cosine_alignment", "auto", device, torch.float64)
        assert choice.backend == "reference"
        assert "float64" in choice.reason


def test_an_explicit_backend_never_falls_back(libraries):
    libraries(cpp=False, cuda=False)
    with pytest.raises(RuntimeError, match=r"backend='cpp' cannot run: .*no compiler.*Possible here: reference"):
        dispatch.choose("cosine_alignment", "cpp", "cpu", torch.float32)
    with pytest.raises(
        RuntimeError, match=r"backend='cuda' cannot run: .*no toolkit.*Possible here: reference, triton"
    ):
        dispatch.choose("cosine_alignment", "cuda", "cuda", torch.float32)


def test_the_environment_overrides_auto_and_is_named_in_the_error(libraries, monkeypatch):
    libraries(cpp=True, cuda=True)
    monkeypatch.setattr(dispatch, "_environment_backend", "reference")
    assert dispatch.choose("cosine_alignment", "auto", "cpu", torch.float32).backend == "reference"
    assert dispatch.choose("cosine_alignment", "cpp", "cpu", torch.float32).backend == "cpp"
    monkeypatch.setattr(dispatch, "_environment_backend", "cuda")
    with pytest.raises(RuntimeError, match="LAYERSYNC_BACKEND=cuda cannot run"):
        dispatch.choose("cosine_alignment", "auto", "cpu", torch.float32)
    monkeypatch.setattr(dispatch, "_environment_backend", "fast")
    with pytest.raises(ValueError, match="unknown LAYERSYNC_BACKEND=fast"):
        dispatch.choose("cosine_alignment", "auto", "cpu", torch.float32)


def test_a_backend_that_the_op_lacks_is_refused_and_no_reason_to_fail_for_the_environment(libraries, monkeypatch):
    libraries(cpp=True, cuda=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"self_attention: backend='triton' cannot run: attention has no Triton"):
        dispatch.choose("self_attention", "triton", "cpu", torch.float32)
    monkeypatch.setattr(dispatch, "_environment_backend", "triton")
    assert dispatch.choose("layersync_loss", "auto", "cpu", torch.float32).backend == "triton"
    choice = dispatch.choose("attention", "auto", "mps", torch.float32)
    assert choice.backend == "reference"
    assert "LAYERSYNC_BACKEND=triton: attention has no Triton kernels" in choice.reason


def test_kernels_without_a_gradient_serve_constants_only(libraries):
    libraries(cpp=True, cuda=True)
    assert dispatch.choose("spatial_norm", "cpp", "cpu", torch.float32).backend == "cpp"
    choice = dispatch.choose("spatial_norm", "auto", "cpu", torch.float32, grad=True)
    assert choice.backend == "reference"
    assert "no gradient" in choice.reason
    with pytest.raises(RuntimeError, match=r"no gradient, and one is asked for.*Possible here: reference, compile$"):
        dispatch.choose("spatial_norm", "cpp", "cpu", torch.float32, grad=True)


def test_library_products_are_not_called_the_reference():
    for device in ("cpu", "cuda", "mps"):
        assert dispatch.choose("dispersive_loss", "auto", device, torch.float32) == (
            "library", "library products on every device"
        )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"dispersive has no C\+\+ kernels"):
        dispatch.choose("dispersive", "cpp", "cpu", torch.float32)


def test_an_unknown_op_is_refused():
    with pytest.raises(KeyError, match="no op has or serves the name 'alignment'"):
        dispatch.choose("alignment", "auto", "cpu", torch.float32)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_extension_can_be_switched_off():
    report = run("from layersync_kernels.ops import native; print(native.cpp())", LAYERSYNC_NATIVE="0")
    assert "switched off by LAYERSYNC_NATIVE=0" in report.stdout


def test_importing_the_package_loads_neither_triton_nor_the_extension():
    """A cold import stays cheap, and works where either is broken."""
    code = (
        "import sys, torch; before = set(sys.modules); import layersync_kernels; new = set(sys.modules) - before; "
        "print([m for m in new if m.split('.')[0] == 'triton' or m.endswith('._C') or '.sit' in m])"
    )
    report = run(code)
    assert report.stdout.strip() == "[]", report.stderr
