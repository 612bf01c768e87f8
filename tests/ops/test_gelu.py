"""linear_gelu and gelu_mlp on every backend that runs here, against PyTorch in fp64."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from layersync_kernels.functional.gelu import gelu_mlp, linear_gelu
from layersync_kernels.ops import dispatch
from layersync_kernels.ops.gelu import op

from ..support.backends import (
    ALL,
    FUSED,
    HAS_GPU,
    LOWER_INSTRUCTION_SETS,
    STRIDED,
    assert_as_exact_as,
    checkpointed_gradients,
    device_of,
    each_backend,
    results_of,
    run_on_lower_instruction_set,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPS = {
    "linear_gelu": (linear_gelu, ("x", "weight", "bias")),
    "gelu_mlp": (gelu_mlp, ("x", "weight1", "bias1", "weight2", "bias2")),
}


def tensors(name, shape=(2, 3, 8), inner=24, out=10, dtype=torch.float32):
    """Inputs by name: x of `shape`, weights such that no layer changes the magnitude."""
    width = shape[-1]
    x = torch.randn(shape)
    first, second = torch.randn(inner, width) / max(width, 1) ** 0.5, torch.randn(out, inner) / max(inner, 1) ** 0.5
    values = (x, first, torch.randn(inner), second, torch.randn(out))
    return {n: value.to(dtype) for n, value in zip(OPS[name][1], values, strict=False)}


def run(name, inputs, backend, grad=None):
    """See `results_of`."""
    return results_of(OPS[name][0], inputs, backend, grad)


def check(name, inputs, backend, grad=None):
    """Compare a backend with the truth: the reference in fp64; the yardstick is PyTorch in the inputs' dtype."""
    baseline = run(name, inputs, "reference", grad)
    grad = torch.ones_like(baseline["output"]) if grad is None else grad.to(baseline["output"])
    actual = run(name, inputs, backend, grad)
    truth = run(name, {n: None if t is None else t.double() for n, t in inputs.items()}, "reference", grad)
    assert actual.keys() == truth.keys()
    for n, result in actual.items():
        assert result.dtype == baseline[n].dtype
        assert_as_exact_as(result, baseline[n], truth[n])
    return actual


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients(backend, dtype, name, poisoned_memory):
    inputs = tensors(name, (3, 5, 40), 72, 33, dtype)
    check(name, inputs, backend, torch.randn(3, 5, 72 if name == "linear_gelu" else 33))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("missing", [["bias"], ["bias1"], ["bias2"], ["bias1", "bias2"]], ids="-".join)
def test_without_bias(backend, missing):
    name = "linear_gelu" if missing == ["bias"] else "gelu_mlp"
    check(name, {**tensors(name), **dict.fromkeys(missing)}, backend)


@pytest.mark.parametrize(("backend", "inner"), each_backend([1, 3, 16, 31, 33, 131, 384, 1153, 4608], [1, 33, 131]))
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_width(backend, inner, dtype, poisoned_memory):
    check("linear_gelu", tensors("linear_gelu", (7, 8), inner, dtype=dtype), backend, torch.randn(7, inner))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("rows", [1, 2, 67, 1031])
def test_any_number_of_rows(backend, rows):
    """The bias sum has several partials, with rests of every kind."""
    if backend == "triton" and rows == 1031:
        pytest.skip("slow in Triton's interpreter")
    for name in OPS:
        check(name, tensors(name, (rows, 4), 12), backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 3, 4), (2, 1, 3, 2)])
def test_any_leading_dimensions(backend, leading):
    device = device_of(backend)
    x, weight, bias = (t.to(device) for t in tensors("linear_gelu", (*leading, 8)).values())
    output = linear_gelu(x, weight, bias, backend=backend)
    torch.testing.assert_close(output, F.gelu(F.linear(x, weight, bias), approximate="tanh"))
    mlp = gelu_mlp(x, weight, bias, weight.t(), None, backend=backend)
    torch.testing.assert_close(mlp, F.linear(output, weight.t()))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_activation_and_its_slope_over_the_whole_line(backend, dtype):
    """The bias alone makes the pre-activation, so that the products add no error of their own.

    1 + tanh cancels where u is negative: there the truth is a small number, and PyTorch itself 1e-7 off.
    """
    u = torch.cat([torch.linspace(-14, 14, 1999), torch.tensor([1e2, -1e2, 6e4, -6e4, 0.0, -0.0])]).to(dtype)
    grad = torch.randn(1, u.numel()).to(dtype)
    inputs = {"x": torch.zeros(1, 1).to(dtype), "weight": torch.zeros(u.numel(), 1).to(dtype), "bias": u}
    actual = run("linear_gelu", inputs, backend, grad)
    exact = u.double().requires_grad_()
    output = F.gelu(exact, approximate="tanh")
    (slope,) = torch.autograd.grad(output, exact, grad[0].double())
    eps, fine = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    torch.testing.assert_close(actual["output"][0].double(), output.detach(), rtol=eps, atol=8 * fine)
    torch.testing.assert_close(actual["d_bias"].double(), slope, rtol=2 * eps, atol=32 * fine)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_are_those_of_pytorch(backend, dtype):
    """At -inf the formula is 0 · inf, and a slope is NaN at both ends, as PyTorch has it."""
    u = torch.tensor([1.0, float("inf"), -float("inf"), float("nan"), -1.0] * 7).to(dtype)
    inputs = {"x": torch.zeros(2, 1).to(dtype), "weight": torch.zeros(35, 1).to(dtype), "bias": u}
    actual = run("linear_gelu", inputs, backend)
    leaf = u.clone().requires_grad_()
    expected = F.gelu(leaf, approximate="tanh")
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps, "equal_nan": True}
    for row in actual["output"]:
        torch.testing.assert_close(row, expected.detach(), **tolerance)
    torch.testing.assert_close(actual["d_bias"], 2 * slope, **tolerance)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", OPS)
def test_nan_in_a_token_stays_there(backend, name):
    inputs = tensors(name, (2, 3, 8))
    clean = run(name, inputs, backend)
    inputs["x"][1, 2, 5] = float("nan")
    poisoned = run(name, inputs, backend)
    others = torch.arange(6).reshape(2, 3) != 5
    for n in ("output", "d_x"):
        torch.testing.assert_close(poisoned[n][others], clean[n][others])
        assert poisoned[n][1, 2].isnan().all()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("name", OPS)
def test_inputs_and_gradients_of_any_stride(backend, view, name, poisoned_memory):
    inputs = tensors(name, (3, 4, 10))
    grad = torch.randn(3, 4, 24 if name == "linear_gelu" else 10)
    for x, g in ((STRIDED[view](inputs["x"]), grad), (inputs["x"], STRIDED[view](grad))):
        actual = run(name, {**inputs, "x": x}, backend, g)
        expected = run(name, {**inputs, "x": x.contiguous()}, backend, g.contiguous())
        for n, result in actual.items():
            torch.testing.assert_close(result, expected[n], rtol=1e-5, atol=1e-5)  # the products may go another way


@pytest.mark.parametrize("backend", FUSED)
def test_gradients_expanded_over_channels_and_channels_first(backend):
    inputs = tensors("linear_gelu")
    for grad in (
        torch.randn(2, 3, 1).expand(2, 3, 24),
        torch.randn(2, 24, 3).transpose(1, 2),
        torch.ones(1).expand(2, 3, 24),
    ):
        check("linear_gelu", inputs, backend, grad)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 8)])
@pytest.mark.parametrize("name", OPS)
def test_no_rows_give_empty_results_and_zero_sums(backend, shape, name):
    inputs = tensors(name, shape)
    results = run(name, inputs, backend)
    assert results["output"].shape == (*shape[:-1], 24 if name == "linear_gelu" else 10)
    for n, tensor in inputs.items():
        assert torch.equal(results[f"d_{n}"], torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(backend, name, x_dtype):
    """Parameters in fp32, activations in either dtype: the output is what `F.linear` gives, the gradients are fp32."""
    device = device_of(backend)
    leaves = {n: t.to(device).requires_grad_() for n, t in tensors(name).items()}
    call = functools.partial(OPS[name][0], backend=backend)
    x, *parameters = leaves.values()
    with torch.autocast(device, dtype=torch.bfloat16):
        output = call(x.to(x_dtype), *parameters)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, call(*(t.bfloat16() for t in leaves.values())))
    output.float().square().sum().backward()
    wide = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    OPS[name][0](*wide.values()).square().sum().backward()
    for n, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        error = (leaf.grad.cpu().double() - wide[n].grad.cpu()).norm() / wide[n].grad.cpu().norm()
        assert error < 8 * torch.finfo(torch.bfloat16).eps


SUBSETS = [n for r in (1, 2, 4) for n in itertools.combinations(OPS["gelu_mlp"][1], r)]


@pytest.mark.parametrize(("backend", "frozen"), each_backend(SUBSETS, [("x",), ("weight2",), ("weight1", "bias1")]))
def test_frozen_inputs_change_no_other_gradient(backend, frozen):
    device = device_of(backend)
    for name, (function, names) in OPS.items():
        inputs = tensors(name)
        if set(names) <= set(frozen):
            continue
        leaves = {n: t.to(device).requires_grad_(n not in frozen) for n, t in inputs.items()}
        output = function(*leaves.values(), backend=backend)
        output.backward(torch.ones_like(output))  # as `run` does: the products of an expanded gradient go another way
        expected = run(name, inputs, backend)
        for n, leaf in leaves.items():
            assert leaf.grad is None if n in frozen else torch.equal(leaf.grad.cpu(), expected[f"d_{n}"])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inner", [2048, 2050])
def test_large_outputs_are_those_of_their_parts(dtype, inner, poisoned_memory):
    """From 8 MB on the CPU kernels write past the cache where rows are aligned, by other instructions."""
    device = "cuda" if HAS_GPU else "cpu"
    backend = dispatch.resolve("gelu", "auto", device, dtype)
    if backend == "reference":
        pytest.skip("no compiled kernels")
    u, d_activation = (torch.randn(2100, inner, device=device).to(dtype) for _ in range(2))
    whole = (op.FORWARD[backend](u), *op.BACKWARD[backend](d_activation, u, True, False)[:2])
    for part in torch.arange(2100).chunk(30):
        parts = (op.FORWARD[backend](u[part]), *op.BACKWARD[backend](d_activation[part], u[part], True, False)[:2])
        for result, expected in zip(whole, parts, strict=True):
            assert torch.equal(result[part], expected)


@pytest.mark.threads
@pytest.mark.parametrize("backend", FUSED)
def test_results_are_deterministic(backend):
    inputs = tensors("gelu_mlp", (67, 8) if backend == "triton" else (1000, 8), 131)
    first = run("gelu_mlp", inputs, backend)
    u, d_activation = torch.randn(2, 300, 65, device=device_of(backend)).unbind()
    kernel = op.BACKWARD[backend](d_activation, u, True, True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for a, e in zip(op.BACKWARD[backend](d_activation, u, True, True), kernel, strict=True):
                assert torch.equal(a, e)
            if count == 1:  # the products are the library's: their sums may depend on the threads
                for n, result in run("gelu_mlp", inputs, backend).items():
                    largest = first[n].abs().max().item()
                    torch.testing.assert_close(result, first[n], rtol=0, atol=1e-5 * largest)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", OPS)
def test_keeps_the_preactivation_but_not_the_activation(backend, name):
    leaves = [t.to(device_of(backend)).requires_grad_() for t in tensors(name, (50, 8), 64).values()]
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = OPS[name][0](*leaves, backend=backend)
    new = [t for pointer, t in saved.items() if pointer not in {leaf.data_ptr() for leaf in leaves}]
    assert [tuple(t.shape) for t in new] == [(50, 64)]
    torch.testing.assert_close(new[0], F.linear(*leaves[:3]))
    assert output.data_ptr() not in saved


@pytest.mark.parametrize("backend", FUSED)
def test_the_activation_is_kept_where_it_is_told_to(backend):
    inputs = {n: t.to(device_of(backend)) for n, t in tensors("gelu_mlp", (50, 8), 64).items()}
    results, kept = {}, {}
    for keep in ("preactivation", "activation"):
        leaves = [t.clone().requires_grad_() for t in inputs.values()]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            output = gelu_mlp(*leaves, keep=keep, backend=backend)
        kept[keep] = [t for t in saved if t.shape == (50, 64)]
        results[keep] = (output, *torch.autograd.grad(output, leaves, torch.ones_like(output)))
    (preactivation,) = kept["preactivation"]
    assert torch.equal(kept["activation"][0], preactivation)
    torch.testing.assert_close(kept["activation"][1], F.gelu(preactivation, approximate="tanh"))
    for one, other in zip(*results.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_an_unknown_keep_is_refused():
    with pytest.raises(ValueError, match="gelu_mlp: unknown keep='all'; expected 'preactivation' or 'activation'"):
        gelu_mlp(*tensors("gelu_mlp").values(), keep="all")


WEIGHTS = torch.linspace(-1, 1, 128).view(16, 8), torch.linspace(1, -1, 64).view(4, 16)
CALLS = {
    "linear_gelu": lambda x, backend: linear_gelu(x, WEIGHTS[0].to(x.dtype), backend=backend),
    "gelu_mlp": lambda x, backend: gelu_mlp(
        x, WEIGHTS[0].to(x.dtype), None, WEIGHTS[1].to(x.dtype), None, backend=backend
    ),
}


def raw_samples(backend):
    """Arguments of every raw op, for test_registry.py."""
    u, gradient = torch.randn(3, 8, device=device_of(backend)), torch.randn(3, 16, device=device_of(backend))[:, :8]
    yield "gelu_forward", (u,)
    for activation, bias in itertools.product((False, True), repeat=2):
        yield "gelu_backward", (gradient, u, activation, bias)
    if backend == "cuda":  # the fakes of the products are tested without a card in test_gelu_cublaslt.py
        x, weight, bias, weight2 = (
            torch.randn(shape, device=device_of(backend)).bfloat16() for shape in ((6, 16), (24, 16), (24,), (8, 24))
        )
        u, d_output = (torch.randn(shape, device=device_of(backend)).bfloat16() for shape in ((6, 24), (6, 8)))
        yield "linear_gelu_gemm", (x, weight, bias)
        yield "linear_gelu_gemm", (x, weight, None)
        yield "gelu_mlp_gemm_backward", (d_output, weight2, u)


@pytest.mark.parametrize("backend", [backend for backend in FUSED if backend.values != ("triton",)])
def test_raw_ops_refuse_inputs_that_the_edge_would_have_caught(backend):
    """The Triton launcher alone trusts the Python edge."""
    u = torch.randn(3, 8, device=device_of(backend))
    for bad, match in (
        (torch.randn(8, 3, device=u.device).t(), "must be contiguous"),
        (u[0], r"of shape \(M, W\)"),
        (u.double(), "takes float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op.FORWARD[backend](bad)
    for bad, match in (
        (u[:2], "d_activation and preactivation differ in dimension 0: 2 and 3"),
        (u.half(), "d_activation must have the dtype of preactivation"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op.BACKWARD[backend](bad, u, True, True)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", OPS)
def test_fullgraph_compile_equals_eager_and_does_not_recompile(backend, name):
    torch._dynamo.reset()

    def step(x, *parameters):
        return OPS[name][0](2 * x, *parameters, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    parameters = [t.to(device_of(backend)).requires_grad_() for t in list(tensors(name).values())[1:]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 3), (4, 5), (6, 7)):
            x = torch.randn(batch, tokens, 8, device=device_of(backend), requires_grad=True)
            outputs = [call(x, *parameters) for call in (compiled, step)]
            gradients = [torch.autograd.grad(output.square().sum(), [x, *parameters]) for output in outputs]
            assert torch.equal(*outputs)
            for a, e in zip(*gradients, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_inductor_keeps_the_op_and_its_numbers():
    torch._dynamo.reset()
    leaves = [t.requires_grad_() for t in tensors("gelu_mlp", (8, 16), 64).values()]
    step = lambda *args: gelu_mlp(args[0] * 2 + 1, *args[1:]).square().sum()  # noqa: E731
    compiled, eager = torch.compile(step, fullgraph=True)(*leaves), step(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, e in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", OPS)
def test_functional_gradient(backend, name):
    inputs = tensors(name)
    arguments = [t.to(device_of(backend)) for t in inputs.values()]
    call = functools.partial(OPS[name][0], backend=backend)
    gradients = torch.func.grad(lambda *args: call(*args).sum(), argnums=tuple(range(len(arguments))))(*arguments)
    expected = run(name, inputs, backend)
    for n, gradient in zip(inputs, gradients, strict=True):
        torch.testing.assert_close(gradient.cpu(), expected[f"d_{n}"])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_checkpointing(backend, use_reentrant, name):
    inputs = tensors(name)
    expected = run(name, inputs, backend)
    for n, gradient in checkpointed_gradients(OPS[name][0], inputs, backend, use_reentrant).items():
        assert torch.equal(gradient, expected[n])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_an_error(backend, name):
    leaves = [t.to(device_of(backend)).requires_grad_() for t in tensors(name).values()]
    output = OPS[name][0](*leaves, backend=backend)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_fp64_runs_through_the_reference():
    inputs = [t.double() for t in tensors("linear_gelu").values()]
    assert linear_gelu(*inputs).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"float64 runs through the reference only"):
        linear_gelu(*inputs, backend="cpp")


@pytest.mark.parametrize("isa", LOWER_INSTRUCTION_SETS)
def test_lower_instruction_sets_pass_the_same_tests(isa):
    numbers = "values or width or rows or line or nan or stride or large or deterministic"
    run_on_lower_instruction_set(isa, __file__, f"(cpp or large) and ({numbers})")


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        ("linear_gelu", {"x": torch.ones(2, 3, 8, dtype=torch.long)}, TypeError, "linear_gelu: x must be .*int64"),
        ("linear_gelu", {"x": torch.tensor(1.0)}, ValueError, "x needs a channel dimension"),
        ("linear_gelu", {"x": torch.ones(2, 3, 7)}, ValueError, r"weight \(24, 8\) must have the shape \(out, 7\)"),
        ("linear_gelu", {"x": torch.ones(2, 8).half()}, TypeError, "must have one dtype outside autocast"),
        ("linear_gelu", {"weight": torch.ones(24, 8, 1)}, ValueError, r"weight \(24, 8, 1\) must have the shape"),
        ("linear_gelu", {"weight": torch.ones(24, 8, device="meta")}, ValueError, "weight is on meta and x on cpu"),
        ("linear_gelu", {"bias": torch.ones(8)}, ValueError, r"bias \(8,\) must have the shape \(24,\)"),
        ("linear_gelu", {"bias": torch.ones(24, 1)}, ValueError, r"bias \(24, 1\) must have"),
        ("linear_gelu", {"bias": torch.ones(24, dtype=torch.int8)}, TypeError, "bias must be .*int8"),
        ("gelu_mlp", {"weight2": torch.ones(10, 8)}, ValueError, r"gelu_mlp: weight2 \(10, 8\) .* \(out, 24\)"),
        ("gelu_mlp", {"bias1": torch.ones(10)}, ValueError, r"bias1 \(10,\) must have the shape \(24,\)"),
        ("gelu_mlp", {"bias2": torch.ones(24)}, ValueError, r"bias2 \(24,\) must have the shape \(10,\)"),
        ("gelu_mlp", {"weight1": [1.0]}, TypeError, "weight1 must be a tensor.*got list"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(name, change, error, match):
    with pytest.raises(error, match=match):
        OPS[name][0](*{**tensors(name), **change}.values())


def test_an_unknown_backend_is_explained():
    with pytest.raises(ValueError, match="expected one of auto, reference, cpp, triton, cuda"):
        linear_gelu(*tensors("linear_gelu").values(), backend="gpu")
