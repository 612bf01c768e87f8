"""When the GELU of a GPU rides in cuBLASLt's epilogue, and that autograd is the same around it; here on stand-ins."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from layersync_kernels.ops import dispatch, native, registry, tuning
from layersync_kernels.ops.gelu import cublaslt, epilogue, op
from layersync_kernels.runtime import environment

BF16 = torch.bfloat16


def slope(u):
    """(GELU, its derivative), in double precision."""
    u = u.double()
    derivative = torch.ops.aten.gelu_backward(torch.ones_like(u), u, approximate="tanh")
    return F.gelu(u, approximate="tanh"), derivative


def linear_gelu_gemm(x, weight, bias):
    u = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return slope(u)[0].to(x.dtype), u.to(x.dtype)


def gelu_mlp_gemm_backward(d_output, weight2, preactivation):
    d = d_output.double() @ weight2.double() * slope(preactivation)[1]
    return d.to(preactivation.dtype), d.sum(0).to(preactivation.dtype)


def gelu_forward(preactivation):
    return slope(preactivation)[0].to(preactivation.dtype)


def gelu_backward(d_activation, preactivation, activation, bias):
    y, derivative = slope(preactivation)
    d = d_activation.double() * derivative
    none = preactivation.new_empty(0)
    d_bias = d.sum(0).float() if bias else none.float()
    return d.to(preactivation.dtype), y.to(preactivation.dtype) if activation else none, d_bias


@pytest.fixture
def calls(monkeypatch):
    """CPU stand-ins for the CUDA ops; returns the names of those that ran."""
    monkeypatch.setattr(cublaslt, "ENABLED", True)
    names = []

    def recorded(function):
        def run(*args):
            names.append(function.__name__)
            return function(*args)

        return run

    with torch.library._scoped_library("layersync_cuda", "IMPL") as library:
        for function in (linear_gelu_gemm, gelu_mlp_gemm_backward, gelu_forward, gelu_backward):
            library.impl(function.__name__, recorded(function), "CPU")
        yield names


def inputs(dtype=BF16, rows=6, width=16, hidden=24, out=8, bias=True):
    """x, weight1, bias1, weight2 and bias2 as leaves."""
    shapes = (rows, width), (hidden, width), (hidden,), (out, hidden), (out,)
    made = [None if len(s) == 1 and not bias else (torch.randn(s) / s[-1] ** 0.5).to(dtype) for s in shapes]
    return [None if t is None else t.requires_grad_() for t in made]


def step(function, arguments, backend="cuda", keep=False):
    """Output and gradients."""
    output, *_ = function.run(*arguments, backend, *([keep] if function is op.GeluMlp else []))
    leaves = [t for t in arguments if t is not None]
    return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]


FUNCTIONS = pytest.mark.parametrize(("function", "count"), [(op.LinearGelu, 3), (op.GeluMlp, 5)], ids=["linear", "mlp"])


@FUNCTIONS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
def test_both_paths_agree(function, count, bias, dtype, calls, monkeypatch):
    arguments = inputs(dtype, bias=bias)[:count]
    found = step(function, arguments)
    backward = ["gelu_backward"] if function is op.LinearGelu else ["gelu_mlp_gemm_backward", "gelu_forward"]
    assert calls == ["linear_gelu_gemm", *backward]
    calls.clear()
    monkeypatch.setattr(cublaslt, "ENABLED", False)
    plain = step(function, arguments)
    assert calls == ["gelu_forward", "gelu_backward"]
    for one, other in zip(found, plain, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_an_activation_that_is_kept_is_not_computed_again(calls):
    arguments = inputs()
    expected = step(op.GeluMlp, arguments)
    calls.clear()
    found = step(op.GeluMlp, arguments, keep=True)
    assert calls == ["linear_gelu_gemm", "gelu_mlp_gemm_backward"]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=4 * torch.finfo(BF16).eps, atol=4 * torch.finfo(BF16).eps)


def test_a_gradient_that_nobody_wants_is_not_computed(calls):
    x, weight1, bias1, weight2, bias2 = inputs()
    output, _ = op.GeluMlp.run(x, weight1, bias1, weight2.detach(), bias2, "cuda", False)
    calls.clear()
    output.sum().backward()
    # The gradient of a sum is expanded, with rows on top of each other: a pass of its own.
    assert calls == ["gelu_backward"]
    output, _ = op.GeluMlp.run(x, weight1, bias1, weight2.detach(), bias2, "cuda", False)
    calls.clear()
    output.backward(torch.ones_like(output))
    assert calls == ["gelu_mlp_gemm_backward"]


UNSUPPORTED = {
    "fp32": lambda x, w, b: (x.float(), w.float(), b.float()),
    "rows apart by no multiple of 8": lambda x, w, b: (F.pad(x, (0, 1))[:, :-1], w, b),
    "columns first": lambda x, w, b: (x.t().contiguous().t(), w, b),
    "weight of columns first": lambda x, w, b: (x, w.t().contiguous().t(), b),
    "one row for all": lambda x, w, b: (x[:1].expand_as(x), w, b),
    "every other column": lambda x, w, b: (x.repeat_interleave(2, 1)[:, ::2], w, b),
    "part of the columns": lambda x, w, b: (x[:, :9], w[:, :9], b),
    "odd input": lambda x, w, b: (x[:, :9].contiguous(), w[:, :9].contiguous(), b),
    "odd output": lambda x, w, b: (x, w[:9], b[:9]),
    "bias with gaps": lambda x, w, b: (x, w, b.repeat_interleave(2)[::2]),
    "no rows": lambda x, w, b: (x[:0], w, b),
}


@pytest.mark.parametrize("change", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_the_library_cannot_take_goes_the_plain_way(change, calls):
    with torch.no_grad():
        x, weight, bias = (t.detach() for t in inputs()[:3])
        assert epilogue.serving("cuda", x, weight, bias)
        x, weight, bias = change(x, weight, bias)
        output, _ = op.LinearGelu.run(x, weight, bias, "cuda")
    assert calls == ["gelu_forward"]
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    torch.testing.assert_close(output.double(), exact, rtol=0.02, atol=0.02)


def test_other_backends_and_the_default_leave_it_alone(monkeypatch):
    x, weight, bias = inputs()[:3]
    assert environment.CUBLASLT.default == "auto"
    monkeypatch.setattr(cublaslt, "ENABLED", False)
    assert not epilogue.serving("cuda", x, weight, bias)
    monkeypatch.setattr(cublaslt, "ENABLED", True)
    assert not epilogue.serving("triton", x, weight, bias)
    assert not epilogue.serving("cpp", x, weight, bias)


def test_the_environment_switches_it_on():
    code = "from layersync_kernels.ops.gelu import cublaslt; print(cublaslt.ENABLED)"
    environment = {**os.environ, "LAYERSYNC_CUBLASLT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@FUNCTIONS
def test_as_a_route_it_is_what_the_environment_switches_on(function, count, calls, monkeypatch):
    arguments = inputs()[:count]
    expected = step(function, arguments)
    ran = list(calls)
    calls.clear()
    monkeypatch.setattr(cublaslt, "ENABLED", False)
    found = step(function, arguments, "cublaslt")
    assert calls == ran
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def with_cuda(monkeypatch):
    """Pretend that the CUDA extension is loaded, and nothing is asked for."""
    monkeypatch.setattr(native, "cuda", lambda: native.Library(True, "built"))
    monkeypatch.setattr(dispatch, "_environment_backend", "auto")
    monkeypatch.setattr(cublaslt, "_WISH", "auto")


def choose(function="gelu_mlp", backend="auto", dtype=BF16):
    return dispatch.choose(function, backend, "cuda", dtype, width=64)


def test_it_is_taken_by_name_and_by_a_table_but_never_by_rule(with_cuda, monkeypatch):
    assert choose().backend == choose(dtype=torch.float32).backend == "cuda"
    assert choose(backend="cublaslt").backend == "cublaslt"
    with pytest.raises(ValueError, match="unknown backend='cublaslt'; expected one of auto"):
        choose("layersync_loss", "cublaslt")
    with pytest.raises(RuntimeError, match=r"half precision, the tensors are torch\.float32"):
        choose(backend="cublaslt", dtype=torch.float32)
    found = tuning.Entry("cublaslt", "cuda", 1.25), tuning.Table("table.json", "2026-01-02", {}, 0)
    monkeypatch.setattr(tuning, "find", lambda *args: found)
    assert choose() == ("cublaslt", "measured 2026-01-02: 1.25 times as fast as cuda (table.json)")
    assert choose(dtype=torch.float32).backend == "cuda"
    monkeypatch.setattr(cublaslt, "_WISH", "0")
    choice = choose()
    assert choice.backend == "cuda"
    assert "switched off by LAYERSYNC_CUBLASLT=0" in choice.reason
    monkeypatch.setattr(cublaslt, "_WISH", "yes")
    assert "unknown LAYERSYNC_CUBLASLT=yes; expected auto, 0 or 1" in choose().reason


def test_a_wish_for_it_goes_before_a_table(with_cuda, monkeypatch):
    found = tuning.Entry("compile", "cuda", 1.25), tuning.Table("table.json", "2026-01-02", {}, 0)
    monkeypatch.setattr(tuning, "find", lambda *args: found)
    assert choose().backend == "compile"
    forced = {"cublaslt": dataclasses.replace(cublaslt.ROUTE, forced=True)}
    monkeypatch.setitem(registry.find("gelu").__dict__, "routes", forced)
    assert choose().backend == "cuda"  # whose epilogues are switched on
    assert choose(dtype=torch.float32).backend == "compile"  # of which it knows nothing


def test_fakes_tell_shapes_and_dtypes(calls):
    x, weight, bias, *_ = (t.detach() for t in inputs())
    for offset in (bias, None):
        torch.library.opcheck(cublaslt.FORWARD, (x, weight, offset), test_utils=("test_schema", "test_faketensor"))
    d_output, weight2, u = (torch.randn(shape).to(BF16) for shape in ((6, 8), (8, 24), (6, 24)))
    torch.library.opcheck(cublaslt.BACKWARD, (d_output, weight2, u), test_utils=("test_schema", "test_faketensor"))


def test_compiles_in_one_graph_for_any_number_of_rows(calls):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda *a: op.GeluMlp.run(*a, "cuda", False)[0], backend=backend, fullgraph=True, dynamic=True
    )
    for rows in (6, 10, 12):
        arguments = inputs(rows=rows)
        calls.clear()
        output = compiled(*arguments)
        output.backward(torch.ones_like(output))
        assert calls == ["linear_gelu_gemm", "gelu_mlp_gemm_backward", "gelu_forward"]
    assert len(graphs) == 1


@pytest.mark.skipif(not native.cuda().loaded, reason=f"the CUDA extension is {native.cuda().reason}")
@pytest.mark.parametrize("name", ["linear_gelu_gemm", "gelu_mlp_gemm_backward"])
def test_the_extension_brings_the_ops_and_loads_without_the_library(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"layersync_cuda::{name}", "CUDA")
