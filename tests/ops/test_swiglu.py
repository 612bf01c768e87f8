"""swiglu and swiglu_mlp on every backend that runs here, against PyTorch in fp64."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from layersync_kernels.functional import swiglu, swiglu_mlp
from layersync_kernels.ops import dispatch
from layersync_kernels.ops.swiglu import op

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
KINDS = list(itertools.product(("silu", "gelu"), (False, True)))
KIND_IDS = [f"{activation}-{'pairs' if interleaved else 'halves'}" for activation, interleaved in KINDS]
each_kind = pytest.mark.parametrize(("activation", "interleaved"), KINDS, ids=KIND_IDS)
OPS = {"swiglu": (swiglu, ("x12",)), "swiglu_mlp": (swiglu_mlp, ("x", "weight12", "bias12", "weight3", "bias3"))}


def tensors(name, shape=(2, 3, 8), inner=12, out=10, dtype=torch.float32):
    """Inputs by name: x of `shape`, or x12 with `inner` in place of its last dimension and twice as wide."""
    width = shape[-1]
    if name == "swiglu":
        return {"x12": (2 * torch.randn(*shape[:-1], 2 * inner)).to(dtype)}
    weights = torch.randn(2 * inner, width) / max(width, 1) ** 0.5, torch.randn(out, inner) / inner**0.5
    values = torch.randn(shape), weights[0], torch.randn(2 * inner), weights[1], torch.randn(out)
    return {n: value.to(dtype) for n, value in zip(OPS[name][1], values, strict=True)}


def run(name, inputs, backend, grad=None, **kind):
    """See `results_of`."""
    return results_of(OPS[name][0], inputs, backend, grad, **kind)


def check(name, inputs, backend, **kind):
    """Compare a backend with the truth: the reference in fp64; the yardstick is PyTorch in the inputs' dtype."""
    baseline = run(name, inputs, "reference", **kind)
    grad = torch.randn(baseline["output"].shape).to(baseline["output"])
    wide = {n: None if t is None else t.double() for n, t in inputs.items()}
    actual, baseline, truth = (
        run(name, *call, grad, **kind) for call in ((inputs, backend), (inputs, "reference"), (wide, "reference"))
    )
    assert actual.keys() == truth.keys()
    for n, result in actual.items():
        assert result.dtype == baseline[n].dtype
        assert_as_exact_as(result, baseline[n], truth[n])
    return actual


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPS)
@each_kind
def test_values_and_gradients(backend, dtype, name, activation, interleaved, poisoned_memory):
    inputs = tensors(name, (3, 5, 40), 72, 33, dtype)
    check(name, inputs, backend, activation=activation, interleaved=interleaved)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_reference_is_the_formula_of_the_paper(activation):
    x12 = torch.randn(2, 3, 8, dtype=torch.float64)
    gate = F.silu if activation == "silu" else functools.partial(F.gelu, approximate="tanh")
    first, second = x12.chunk(2, dim=-1)
    assert torch.equal(swiglu(x12, activation=activation), gate(first) * second)
    even, odd = x12.unflatten(-1, (4, 2)).unbind(-1)
    assert torch.equal(swiglu(x12, activation=activation, interleaved=True), gate(even) * odd)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("missing", [["bias12"], ["bias3"], ["bias12", "bias3"]], ids="-".join)
def test_without_bias(backend, missing):
    check("swiglu_mlp", {**tensors("swiglu_mlp"), **dict.fromkeys(missing)}, backend)


@pytest.mark.parametrize(("backend", "inner"), each_backend([1, 3, 8, 16, 17, 23, 131, 384, 1153, 3072], [1, 23, 131]))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_width(backend, inner, dtype, interleaved, poisoned_memory):
    check("swiglu", tensors("swiglu", (7, 8), inner, dtype=dtype), backend, interleaved=interleaved)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("rows", [1, 2, 67, 1031])
def test_any_number_of_rows(backend, rows):
    """The bias sum has several partials, with rests of every kind."""
    if backend == "triton" and rows == 1031:
        pytest.skip("slow in Triton's interpreter")
    check("swiglu_mlp", tensors("swiglu_mlp", (rows, 4), 12), backend, interleaved=rows % 2 == 1)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3, 4), (2, 1, 3, 2)])
def test_any_leading_dimensions(backend, leading):
    given = {name: {n: t.to(device_of(backend)) for n, t in tensors(name, (*leading, 8)).items()} for name in OPS}
    x12 = given["swiglu"]["x12"]
    first, second = x12.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x12, backend=backend), F.silu(first) * second)
    x, weight12, bias12, weight3, bias3 = given["swiglu_mlp"].values()
    expected = F.linear(swiglu(F.linear(x, weight12, bias12), backend="reference"), weight3, bias3)
    torch.testing.assert_close(swiglu_mlp(x, weight12, bias12, weight3, bias3, backend=backend), expected)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_the_activation_and_its_slope_over_the_whole_line(backend, dtype, activation):
    """x2 and the gradient are 1: the results are f and its slope, and f again."""
    u = torch.cat([torch.linspace(-20, 20, 1999), torch.tensor([1e2, -1e2, 6e4, -6e4, 0.0, -0.0])]).to(dtype)
    actual = run("swiglu", {"x12": torch.cat([u, torch.ones_like(u)])}, backend, activation=activation)
    exact = u.double().requires_grad_()
    output = F.silu(exact) if activation == "silu" else F.gelu(exact, approximate="tanh")
    (slope,) = torch.autograd.grad(output.sum(), exact)
    eps, fine = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    torch.testing.assert_close(actual["output"].double(), output.detach(), rtol=eps, atol=8 * fine)
    d_gate, d_value = actual["d_x12"].double().chunk(2)
    torch.testing.assert_close(d_gate, slope, rtol=2 * eps, atol=32 * fine)
    torch.testing.assert_close(d_value, output.detach(), rtol=eps, atol=8 * fine)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_ends_of_a_dtype(backend, dtype):
    """Products that fit are finite although eager PyTorch's first factor, rounded on its own, may not be."""
    largest = torch.finfo(dtype).max
    gate = torch.tensor([largest, largest, -largest, 1e-3, 20.0, 0.0, -20.0, 2.0])
    value = torch.tensor([1.0, 2.0**-10, 1.0, largest, largest / 32, largest, 1.0, -largest / 4])
    actual = run("swiglu", {"x12": torch.cat([gate, value]).to(dtype)}, backend)
    wide = run("swiglu", {"x12": torch.cat([gate, value]).to(dtype).double()}, "reference")
    for n, result in actual.items():
        expected = wide[n].to(dtype)
        torch.testing.assert_close(result, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", FLOATS)
@each_kind
def test_nan_and_infinity_are_those_of_pytorch(backend, dtype, activation, interleaved):
    values = [1.0, float("inf"), -float("inf"), float("nan"), -1.0, 0.0]
    pairs = torch.tensor(list(itertools.product(values, values))).to(dtype)
    x12 = pairs.flatten() if interleaved else pairs.t().flatten()
    kind = {"activation": activation, "interleaved": interleaved}
    actual, expected = (run("swiglu", {"x12": x12}, name, **kind) for name in (backend, "reference"))
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps, "equal_nan": True}
    for n in actual:
        torch.testing.assert_close(actual[n], expected[n], **tolerance)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", OPS)
def test_nan_in_a_token_stays_there(backend, name):
    inputs = tensors(name)
    first = next(iter(inputs))
    clean = run(name, inputs, backend)
    inputs[first][1, 2] = float("nan")
    poisoned = run(name, inputs, backend)
    others = torch.arange(6).reshape(2, 3) != 5
    for n in ("output", f"d_{first}"):
        torch.testing.assert_close(poisoned[n][others], clean[n][others])
        assert poisoned[n][1, 2].isnan().all()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("name", OPS)
def test_inputs_and_gradients_of_any_stride(backend, view, name, poisoned_memory):
    inputs = tensors(name, (3, 4, 10))
    first = next(iter(inputs))
    x, grad = inputs[first], torch.randn(3, 4, 12 if name == "swiglu" else 10)
    for given, g in ((STRIDED[view](x), grad), (x, STRIDED[view](grad))):
        actual = run(name, {**inputs, first: given}, backend, g, interleaved=view == "batch second")
        plain = {**inputs, first: given.contiguous()}
        expected = run(name, plain, backend, g.contiguous(), interleaved=view == "batch second")
        for n, result in actual.items():
            torch.testing.assert_close(result, expected[n], rtol=1e-5, atol=1e-5)  # the products may go another way


@pytest.mark.parametrize("backend", FUSED)
def test_gradients_expanded_over_channels_and_channels_first(backend):
    inputs = tensors("swiglu")
    for x12 in (inputs["x12"], inputs["x12"].transpose(0, 2).contiguous().transpose(0, 2)):
        for grad in (torch.randn(2, 3, 1).expand(2, 3, 12), torch.randn(2, 12, 3).transpose(1, 2)):
            expected = run("swiglu", {"x12": x12.contiguous()}, backend, grad.contiguous())
            for n, result in run("swiglu", {"x12": x12}, backend, grad).items():
                assert torch.equal(result, expected[n])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0, 4, 8), (0, 8)])
@pytest.mark.parametrize("name", OPS)
def test_no_rows_give_empty_results_and_zero_sums(backend, shape, name):
    inputs = tensors(name, shape)
    results = run(name, inputs, backend)
    assert results["output"].shape == (*shape[:-1], 12 if name == "swiglu" else 10)
    for n, tensor in inputs.items():
        assert torch.equal(results[f"d_{n}"], torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", ALL)
def test_no_channels_give_an_empty_product(backend):
    x12 = torch.randn(2, 3, 0, device=device_of(backend), requires_grad=True)
    output = swiglu(x12, backend=backend)
    assert output.shape == (2, 3, 0)
    assert torch.autograd.grad(output.sum(), x12)[0].shape == x12.shape


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(backend, x_dtype):
    """Parameters in fp32, activations in either dtype: the output is what `F.linear` gives, the gradients are fp32."""
    device = device_of(backend)
    leaves = {n: t.to(device).requires_grad_() for n, t in tensors("swiglu_mlp").items()}
    x, *parameters = leaves.values()
    with torch.autocast(device, dtype=torch.bfloat16):
        output = swiglu_mlp(x.to(x_dtype), *parameters, backend=backend)
    assert torch.equal(output, swiglu_mlp(*(t.bfloat16() for t in leaves.values()), backend=backend))
    output.float().square().sum().backward()
    wide = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    swiglu_mlp(*wide.values()).square().sum().backward()
    for n, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        error = (leaf.grad.cpu().double() - wide[n].grad.cpu()).norm() / wide[n].grad.cpu().norm()
        assert error < 8 * torch.finfo(torch.bfloat16).eps


SUBSETS = [n for r in (1, 2, 4) for n in itertools.combinations(OPS["swiglu_mlp"][1], r)]


@pytest.mark.parametrize(("backend", "frozen"), each_backend(SUBSETS, [("weight3",), ("weight12", "bias12")]))
def test_frozen_inputs_change_no_other_gradient(backend, frozen):
    inputs = tensors("swiglu_mlp")
    leaves = {n: t.to(device_of(backend)).requires_grad_(n not in frozen) for n, t in inputs.items()}
    output = swiglu_mlp(*leaves.values(), backend=backend)
    output.backward(torch.ones_like(output))  # as `run` does: the products of an expanded gradient go another way
    expected = run("swiglu_mlp", inputs, backend)
    for n, leaf in leaves.items():
        assert leaf.grad is None if n in frozen else torch.equal(leaf.grad.cpu(), expected[f"d_{n}"])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inner", [1024, 1026])
@pytest.mark.parametrize("interleaved", [False, True])
def test_large_outputs_are_those_of_their_parts(dtype, inner, interleaved, poisoned_memory):
    """From 8 MB on the CPU kernels write past the cache where rows are aligned, by other instructions."""
    device = "cuda" if HAS_GPU else "cpu"
    backend = dispatch.resolve("swiglu", "auto", device, dtype)
    if backend == "reference":
        pytest.skip("no compiled kernels")
    rows = 2100 if dtype == torch.float32 else 4200
    x12, grad = torch.randn(rows, 2 * inner, device=device).to(dtype), torch.randn(rows, inner, device=device).to(dtype)

    def results(x12, grad):
        backward = op.BACKWARD[backend](grad, x12, False, interleaved, True, False)
        return op.FORWARD[backend](x12, False, interleaved), *backward[:2]

    whole = results(x12, grad)
    for part in torch.arange(rows).chunk(12):
        for result, expected in zip(whole, results(x12[part], grad[part]), strict=True):
            assert torch.equal(result[part], expected)


@pytest.mark.threads
@pytest.mark.parametrize("backend", FUSED)
def test_results_are_deterministic(backend):
    rows, device = 40 if backend == "triton" else 300, device_of(backend)
    x12, grad = torch.randn(rows, 130, device=device), torch.randn(rows, 65, device=device)
    first = op.BACKWARD[backend](grad, x12, False, False, True, True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for a, e in zip(op.BACKWARD[backend](grad, x12, False, False, True, True), first, strict=True):
                assert torch.equal(a, e)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", OPS)
def test_keeps_both_halves_but_not_their_product(backend, name):
    leaves = [t.to(device_of(backend)).requires_grad_() for t in tensors(name, (50, 8), 64).values()]
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = OPS[name][0](*leaves, backend=backend)
    new = [t for pointer, t in saved.items() if pointer not in {leaf.data_ptr() for leaf in leaves}]
    assert [tuple(t.shape) for t in new] == ([] if name == "swiglu" else [(50, 128)])
    if new:
        torch.testing.assert_close(new[0], F.linear(*leaves[:3]))
    assert output.data_ptr() not in saved


WEIGHTS = torch.linspace(-1, 1, 128).view(16, 8), torch.linspace(1, -1, 32).view(4, 8)
CALLS = {
    "swiglu": lambda x, backend: swiglu(x, interleaved=True, backend=backend),
    "swiglu_mlp": lambda x, backend: swiglu_mlp(
        x, WEIGHTS[0].to(x.dtype), None, WEIGHTS[1].to(x.dtype), None, activation="gelu", backend=backend
    ),
}


def raw_samples(backend):
    """Arguments of every raw op, for test_registry.py."""
    x12, grad = torch.randn(3, 2, 16, device=device_of(backend)), torch.randn(3, 2, 16, device=device_of(backend))
    for gelu, interleaved in itertools.product((False, True), repeat=2):
        yield "swiglu_forward", (x12, gelu, interleaved)
    for interleaved, output, bias in itertools.product((False, True), repeat=3):
        yield "swiglu_backward", (grad[..., :8], x12, False, interleaved, output, bias)


@pytest.mark.parametrize("backend", [backend for backend in FUSED if backend.values != ("triton",)])
def test_raw_ops_refuse_inputs_that_the_edge_would_have_caught(backend):
    """The Triton launcher alone trusts the Python edge."""
    x12, grad = torch.randn(3, 8, device=device_of(backend)), torch.randn(3, 4, device=device_of(backend))
    for bad, match in ((x12[:, :7], "two halves side by side"), (x12.double(), "takes float32, bfloat16 or float16")):
        with pytest.raises(RuntimeError, match=match):
            op.FORWARD[backend](bad, False, False)
    for bad, match in ((grad[:2], "must have the sizes of x12"), (grad.half(), "grad must have the dtype of x12")):
        with pytest.raises(RuntimeError, match=match):
            op.BACKWARD[backend](bad, x12, False, False, True, True)


@pytest.mark.parametrize("backend", FUSED)
def test_fullgraph_compile_equals_eager_and_does_not_recompile(backend):
    torch._dynamo.reset()

    def step(x, *parameters):
        return swiglu(swiglu_mlp(2 * x, *parameters, backend=backend), backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    parameters = [t.to(device_of(backend)).requires_grad_() for t in list(tensors("swiglu_mlp").values())[1:]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 3), (4, 5), (6, 7)):
            x = torch.randn(batch, tokens, 8, device=device_of(backend), requires_grad=True)
            outputs = [call(x, *parameters) for call in (compiled, step)]
            gradients = [torch.autograd.grad(output.square().sum(), [x, *parameters]) for output in outputs]
            assert torch.equal(*outputs)
            for a, e in zip(*gradients, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("isa", LOWER_INSTRUCTION_SETS)
def test_lower_instruction_sets_pass_the_same_tests(isa):
    run_on_lower_instruction_set(isa, __file__, "cpp and (values or line) or large and 1024")


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        ("swiglu", {"x12": torch.ones(2, 3, 7)}, ValueError, r"x12 must have two halves, \(..., 2·H\), got 7 channels"),
        ("swiglu", {"x12": torch.ones(2, dtype=torch.long)}, TypeError, "swiglu: x12 must be .*int64"),
        ("swiglu", {"x12": torch.tensor(1.0)}, ValueError, "x12 needs a channel dimension"),
        ("swiglu_mlp", {"weight12": torch.ones(23, 8)}, ValueError, r"weight12 \(23, 8\) must have two halves of rows"),
        ("swiglu_mlp", {"weight12": torch.ones(24, 7)}, ValueError, r"weight12 \(24, 7\) must have the shape \(out, 8"),
        ("swiglu_mlp", {"bias12": torch.ones(12)}, ValueError, r"bias12 \(12,\) must have the shape \(24,\)"),
        ("swiglu_mlp", {"weight3": torch.ones(10, 24)}, ValueError, r"weight3 \(10, 24\) must have .* \(out, 12\)"),
        ("swiglu_mlp", {"bias3": torch.ones(12)}, ValueError, r"bias3 \(12,\) must have the shape \(10,\)"),
        ("swiglu_mlp", {"x": torch.ones(2, 8).half()}, TypeError, "must have one dtype outside autocast"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(name, change, error, match):
    with pytest.raises(error, match=match):
        OPS[name][0](*{**tensors(name), **change}.values())


@pytest.mark.parametrize("name", OPS)
def test_an_unknown_activation_is_explained(name):
    with pytest.raises(ValueError, match=f"{name}: unknown activation='relu'; expected 'silu' or 'gelu'"):
        OPS[name][0](*tensors(name).values(), activation="relu")
