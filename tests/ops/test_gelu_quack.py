"""When the GELU of a GPU rides in quack's epilogue, and what quack is given; on a stand-in for GPUs' library."""

import ast
import importlib.metadata
import inspect
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from layersync_kernels.functional.gelu import gelu_mlp
from layersync_kernels.ops import dispatch, native, tuning
from layersync_kernels.ops.gelu import epilogue, op, quack, raw
from layersync_kernels.runtime import machine

from .test_gelu_cublaslt import FUNCTIONS, UNSUPPORTED, gelu_backward, gelu_forward, inputs, slope, step

BF16 = torch.bfloat16


# quack-kernels 0.6.4, quack/gemm_interface.py: the parameters and their defaults.
def gemm_act(
    A, B, C=None, bias=None, activation=None, alpha=1.0, preact_out=None, postact_out=None, out_dtype=None,
    postact_dtype=None, cu_seqlens_m=None, A_idx=None, store_preact=True, dynamic_scheduler=False, tuned=True,
    config=None, concat_layout=None, split_k=1, split_k_mode=None,
):  # fmt: skip
    """(A·B + bias, its activation) for A (M, K) and B (K, N)."""
    check_operands(A, B, bias)
    assert (activation, store_preact, tuned) == ("gelu_tanh_approx", True, False)
    u = A.double() @ B.double() + (0 if bias is None else bias.double())
    return u.to(A.dtype), slope(u)[0].to(A.dtype)


def gemm_dact(
    A, B, PreAct, activation=None, dx_out=None, postact_out=None, out_dtype=None, postact_dtype=None,
    colvec_scale=None, colvec_reduce=False, cu_seqlens_m=None, A_idx=None, dynamic_scheduler=True, tuned=True,
    config=None, split_k=1, split_k_mode=None,
):  # fmt: skip
    """((A·B)·act'(PreAct), act(PreAct)) for A (M, K), B (K, N), PreAct (M, N)."""
    check_operands(A, B, PreAct)
    assert (activation, tuned) == ("gelu_tanh_approx", False)
    value, derivative = slope(PreAct)
    return (A.double() @ B.double() * derivative).to(A.dtype), value.to(PreAct.dtype)


def check_operands(*tensors):
    for tensor in tensors:
        if tensor is not None:
            assert 1 in tensor.stride()
            assert tensor.data_ptr() % 16 == 0
            assert all(stride % 8 == 0 for stride in tensor.stride() if stride != 1)
            assert tensor.dtype in (torch.bfloat16, torch.float16)


@pytest.fixture
def calls(monkeypatch):
    """A quack, and our passes, on the CPU; returns the names of what ran."""
    names = []

    def recorded(function):
        def run(*args, **kwargs):
            names.append(function.__name__)
            return function(*args, **kwargs)

        return run

    module = types.ModuleType("quack.gemm_interface")
    module.gemm_act, module.gemm_dact = recorded(gemm_act), recorded(gemm_dact)
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", module)
    monkeypatch.setitem(raw.FORWARD, "triton", recorded(gelu_forward))
    monkeypatch.setitem(raw.BACKWARD, "triton", recorded(gelu_backward))
    with torch.library._scoped_library("layersync_quack", "IMPL") as library:
        library.impl("linear_gelu_gemm", quack.linear_gelu, "CPU")
        library.impl("gelu_mlp_gemm_recompute", quack.recompute, "CPU")
        yield names


def close(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@FUNCTIONS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
def test_it_agrees_with_the_plain_way(function, count, bias, dtype, calls):
    arguments = inputs(dtype, bias=bias)[:count]
    found = step(function, arguments, "quack")
    assert calls == ["gemm_act", "gelu_backward" if function is op.LinearGelu else "gemm_dact"]
    calls.clear()
    plain = step(function, arguments, "triton")
    assert calls == ["gelu_forward", "gelu_backward"]
    close(found, plain, dtype)


@pytest.mark.parametrize("change", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_it_cannot_take_goes_the_plain_way(change, calls):
    with torch.no_grad():
        x, weight, bias = change(*(t.detach() for t in inputs()[:3]))
        output, _ = op.LinearGelu.run(x, weight, bias, "quack")
    assert calls == ["gelu_forward"]
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    torch.testing.assert_close(output.double(), exact, rtol=0.02, atol=0.02)


def test_views_that_are_not_aligned_are_copied(calls):
    x, weight, bias = (t.detach() for t in inputs()[:3])
    shifted = [F.pad(t.flatten(), (1, 0))[1:].view_as(t) for t in (x, weight, bias)]
    assert any(t.data_ptr() % 16 for t in shifted)
    close(quack.linear_gelu(*shifted), quack.linear_gelu(x, weight, bias), BF16)


def test_the_activation_is_never_kept(calls, monkeypatch):
    """Its gradient's product gives it for one write."""
    monkeypatch.setattr(dispatch, "resolve", lambda *args, **kwargs: "quack")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gelu_mlp(*inputs(), keep="activation", backend="quack")
    assert sorted(tuple(t.shape) for t in saved) == [(6, 16), (6, 24), (8, 24), (24, 16)]


def test_fakes_tell_shapes_and_dtypes(calls):
    x, weight, bias, *_ = (t.detach() for t in inputs())
    for offset in (bias, None):
        arguments = (x, weight, offset)
        torch.library.opcheck(raw.GEMM_FORWARD["quack"], arguments, test_utils=("test_schema", "test_faketensor"))
    arguments = tuple(torch.randn(shape).to(BF16) for shape in ((6, 8), (8, 24), (6, 24)))
    torch.library.opcheck(raw.GEMM_RECOMPUTE["quack"], arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_in_one_graph_for_any_number_of_rows(calls):
    def run(*arguments):
        return op.GeluMlp.run(*arguments, "quack", False)[0]

    compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
    for rows in (6, 10):
        calls.clear()
        output = compiled(*inputs(rows=rows))
        output.backward(torch.ones_like(output))
        assert calls == ["gemm_act", "gemm_dact"]


# ---- When it is taken


@pytest.fixture
def card(monkeypatch):
    """Pretend a Hopper with everything installed; returns what pretends another capability, or a package's absence."""
    monkeypatch.setattr(native, "cuda", lambda: native.Library(True, "built"))
    monkeypatch.setattr(dispatch, "_environment_backend", "auto")
    monkeypatch.setattr(dispatch, "_triton_obstacle", lambda device: None)
    monkeypatch.setitem(dispatch._OBSTACLES, "triton", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def pretend(capability=(9, 0), version="0.6.4"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(machine, "version_of", lambda package, missing="none": version or missing)

    pretend()
    return pretend


def choose(backend="auto", dtype=BF16):
    return dispatch.choose("gelu_mlp", backend, "cuda", dtype, width=64)


def by_a_table(monkeypatch):
    found = tuning.Entry("quack", "cuda", 1.25), tuning.Table("table.json", "2026-01-02", {}, 0)
    monkeypatch.setattr(tuning, "find", lambda *args: found)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_it_is_taken_by_name_and_by_a_table_but_never_by_rule(card, capability, monkeypatch):
    card(capability)
    assert choose().backend == "cuda"
    assert choose("quack").backend == "quack"
    by_a_table(monkeypatch)
    assert choose() == ("quack", "measured 2026-01-02: 1.25 times as fast as cuda (table.json)")
    assert choose(dtype=torch.float32).backend == "cuda"


@pytest.mark.parametrize(
    ("pretended", "message"),
    [
        ({"version": None}, r"quack-kernels is not installed; pip install 'layersync_kernels\[quack\]'"),
        ({"capability": (8, 0)}, r"for Hopper and Blackwell \(sm_90, sm_100\), the GPU is sm_80"),
        ({"capability": (12, 0)}, "the GPU is sm_120"),
    ],
    ids=["package", "ampere", "rtx"],
)
def test_what_is_missing_is_an_error_by_name_and_the_rules_otherwise(card, pretended, message, monkeypatch):
    card(**pretended)
    with pytest.raises(RuntimeError, match=f"gelu_mlp: backend='quack' cannot run: .*{message}"):
        choose("quack")
    by_a_table(monkeypatch)
    choice = choose()
    assert choice.backend == "cuda"
    assert "quack, measured 2026-01-02" in choice.reason


def test_half_precision_and_a_gpu_are_asked_for(card, monkeypatch):
    with pytest.raises(RuntimeError, match=r"quack's epilogues are for half precision, the tensors are torch\.float32"):
        choose("quack", torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no GPU is visible to torch"):
        choose("quack")


def test_other_ops_have_it_not(card):
    with pytest.raises(ValueError, match="unknown backend='quack'; expected one of auto"):
        dispatch.choose("layersync_loss", "quack", "cuda", BF16)


def test_the_environment_of_cublaslt_leaves_it_alone(monkeypatch):
    x, weight, bias = inputs()[:3]
    for enabled in (False, True):
        monkeypatch.setattr(epilogue.cublaslt, "ENABLED", enabled)
        assert epilogue.serving("quack", x, weight, bias) is epilogue.EPILOGUES["quack"]
        assert epilogue.serving("triton", x, weight, bias) is None


def test_the_stand_in_takes_what_quack_takes():
    try:
        files = importlib.metadata.files("quack-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("quack-kernels is not installed")
    (source,) = (file for file in files if str(file) == "quack/gemm_interface.py")
    functions = {node.name: node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
    for function in (gemm_act, gemm_dact):
        arguments = functions[function.__name__].args
        names = [argument.arg for argument in arguments.args]
        assert names == list(inspect.signature(function).parameters)
        found = dict(zip(names[-len(arguments.defaults) :], arguments.defaults, strict=True))
        for name, parameter in inspect.signature(function).parameters.items():
            if name != "split_k_mode":
                expected = inspect.Parameter.empty if name not in found else ast.literal_eval(found[name])
                assert parameter.default == expected, name
