"""qk_norm_rope on every backend that runs here, against PyTorch in fp64."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from layersync_kernels.functional import qk_norm_rope
from layersync_kernels.modules.attention import rotary_positions, rotate
from layersync_kernels.ops.qk_norm_rope import op

from ..support.backends import (
    ALL,
    FUSED,
    LOWER_INSTRUCTION_SETS,
    STRIDED,
    assert_as_exact_as,
    device_of,
    each_backend,
    moved,
    run_on_lower_instruction_set,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WAYS = list(itertools.product(("rms", "layer"), (True, False)))
each_way = pytest.mark.parametrize(("norm", "interleaved"), WAYS)
NAMES = ("qkv", "q_weight", "k_weight", "cos", "sin", "bias")


def tensors(batch=2, tokens=5, heads=3, width=8, dtype=torch.float32):
    """Inputs by name; cos and sin are no angles' that pairs share, so that each channel has its own."""
    return {
        "qkv": torch.randn(batch, tokens, 3 * heads * width).to(dtype),
        "q_weight": torch.rand(width) + 0.5,
        "k_weight": torch.rand(width) + 0.5,
        "cos": torch.randn(tokens, width).cos(),
        "sin": torch.randn(tokens, width).sin(),
        "bias": torch.randn(3 * heads * width),
    }


def without(inputs, *parts):
    gone = {"norm": ("q_weight", "k_weight"), "rope": ("cos", "sin"), "bias": ("bias",)}
    return {**inputs, **{name: None for part in parts for name in gone[part]}}


def call(inputs, heads, backend, **way):
    given = dict(inputs)
    bias = given.pop("bias")
    return qk_norm_rope(*given.values(), heads, bias=bias, backend=backend, **way)


def run(inputs, heads, backend, grads=None, **way):
    """q, k, v and gradients of one call by name, on fresh leaves that keep the strides."""
    device = device_of(backend)
    leaves = {
        n: None if t is None else moved(t.detach(), device).requires_grad_(n not in ("cos", "sin"))
        for n, t in inputs.items()
    }
    outputs = call(leaves, heads, backend, **way)
    wanted = {n: leaf for n, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    grads = [torch.ones_like(t) for t in outputs] if grads is None else [moved(g, device).to(outputs[0]) for g in grads]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), grads)
    results = dict(zip("qkv", outputs, strict=True)) | {f"d_{n}": g for n, g in zip(wanted, gradients, strict=True)}
    return {n: result.detach().cpu() for n, result in results.items()}


def check(inputs, heads, backend, **way):
    """Compare a backend with the truth: the reference in fp64; the yardstick is PyTorch in the inputs' dtype."""
    qkv = inputs["qkv"]
    shape = qkv.shape[0], heads, qkv.shape[1], qkv.shape[2] // (3 * heads)
    grads = [torch.randn(shape).to(qkv.dtype) for _ in range(3)]
    wide = {n: None if t is None else t.double() for n, t in inputs.items()}
    actual, baseline, truth = (
        run(given, heads, name, grads, **way)
        for given, name in ((inputs, backend), (inputs, "reference"), (wide, "reference"))
    )
    assert actual.keys() == truth.keys()
    for n, result in actual.items():
        assert result.dtype == baseline[n].dtype
        assert_as_exact_as(result, baseline[n], truth[n])
    return actual


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
@each_way
def test_values_and_gradients(backend, dtype, norm, interleaved, poisoned_memory):
    check(tensors(2, 5, 3, 24, dtype), 3, backend, norm=norm, interleaved=interleaved)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    "missing", [("norm",), ("rope",), ("norm", "rope"), ("bias",), ("norm", "bias"), ("rope", "bias")]
)
@pytest.mark.parametrize("interleaved", [True, False])
def test_either_part_may_be_missing(backend, missing, interleaved):
    check(without(tensors(), *missing), 3, backend, interleaved=interleaved)


@pytest.mark.parametrize(("backend", "width"), each_backend([2, 16, 32, 48, 64, 72, 96, 128, 136, 200, 256], [2, 72]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [True, False])
def test_any_width_of_a_head(backend, width, dtype, interleaved, poisoned_memory):
    check(tensors(1, 5, 2, width, dtype), 2, backend, interleaved=interleaved, norm="layer" if width > 64 else "rms")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("width", [1, 7, 33])
def test_heads_of_odd_width_are_normed(backend, width):
    check(without(tensors(1, 3, 2, width), "rope"), 2, backend, norm="layer" if width == 7 else "rms")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 1, 1), (3, 67, 2), (50, 3, 5)])
def test_any_number_of_tokens_and_heads(backend, batch, tokens, heads):
    """Sums have several partials, over runs that begin and end within samples."""
    if backend == "triton" and tokens == 67:
        pytest.skip("slow in Triton's interpreter")
    check(tensors(batch, tokens, heads, 16), heads, backend)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("extent", [(6,), (2, 3), (1, 2, 3)])
def test_the_reference_is_what_torch_and_the_module_compute(norm, extent):
    inputs = {n: t.double() for n, t in tensors(2, 6, 3, 12).items()}
    inputs["cos"], inputs["sin"] = (t.double() for t in rotary_positions(extent, 12))
    q, k, v = call(inputs, 3, "reference", norm=norm)
    views = inputs["qkv"].unflatten(-1, (3, 3, 12)).permute(2, 0, 3, 1, 4).unbind(0)
    normalise = {"rms": F.rms_norm, "layer": functools.partial(F.layer_norm, bias=None)}[norm]
    for result, x, weight in ((q, views[0], inputs["q_weight"]), (k, views[1], inputs["k_weight"])):
        expected = rotate(normalise(x, (12,), weight=weight, eps=1e-6), inputs["cos"], inputs["sin"])
        torch.testing.assert_close(result, expected)
    assert torch.equal(v, views[2])


@pytest.mark.parametrize("backend", ALL)
def test_halves_that_turn_are_pairs_in_another_order(backend):
    inputs = without(tensors(2, 5, 3, 16), "norm", "bias")
    order = torch.arange(16).view(2, 8).t().flatten()  # channel of the halves for each channel of the pairs
    paired = {
        "qkv": inputs["qkv"].unflatten(-1, (9, 16))[..., order].flatten(-2),
        **{n: inputs[n][:, order] for n in ("cos", "sin")},
    }
    halves = run(inputs, 3, backend, interleaved=False)
    pairs = run({**inputs, **paired}, 3, backend, interleaved=True)
    for n in "qk":
        torch.testing.assert_close(halves[n][..., order], pairs[n])


@pytest.mark.parametrize("backend", ALL)
def test_values_are_a_view_and_nothing_but_a_norms_input_is_kept(backend):
    inputs = {n: t.to(device_of(backend)) for n, t in tensors().items()}
    leaf = inputs["qkv"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, _, v = call(without(inputs, "norm", "bias"), 3, backend)
    assert v.data_ptr() == leaf.unflatten(-1, (3, 3, 8))[:, :, 2].data_ptr()
    if backend != "reference":
        assert all(t.numel() == inputs["cos"].numel() for t in saved)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("view", STRIDED)
def test_inputs_and_gradients_of_any_stride(backend, view, poisoned_memory):
    inputs = tensors(3, 4)
    grads = [torch.randn(3, 3, 4, 8) for _ in range(3)]
    given = {**inputs, "qkv": STRIDED[view](inputs["qkv"])}
    dense = {**inputs, "qkv": given["qkv"].contiguous()}
    actual, expected = run(given, 3, backend, grads), run(dense, 3, backend, grads)
    for n, result in actual.items():
        torch.testing.assert_close(result, expected[n], rtol=1e-6, atol=1e-6)
    odd = [grads[0].transpose(1, 3).contiguous().transpose(1, 3), grads[1][..., :1].expand(3, 3, 4, 8)]
    odd.append(grads[2].transpose(1, 2).contiguous().transpose(1, 2))
    actual, expected = run(inputs, 3, backend, odd), run(inputs, 3, backend, [g.contiguous() for g in odd])
    for n, result in actual.items():
        torch.testing.assert_close(result, expected[n], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", FLOATS)
@each_way
def test_nan_and_infinity_stay_in_their_head(backend, dtype, norm, interleaved):
    inputs = tensors(dtype=dtype)
    clean = run(inputs, 3, backend, norm=norm, interleaved=interleaved)
    heads = inputs["qkv"].unflatten(-1, (3, 3, 8))
    heads[0, 1, 0, 2, 3], heads[1, 4, 1, 0, 5] = float("nan"), float("inf")
    poisoned = run(inputs, 3, backend, norm=norm, interleaved=interleaved)
    expected = run(inputs, 3, "reference", norm=norm, interleaved=interleaved)
    for n in ("q", "k", "v", "d_qkv"):
        assert torch.equal(poisoned[n].isnan(), expected[n].isnan())
    assert poisoned["q"][0, 2, 1].isnan().all()
    assert poisoned["k"][1, 0, 4].isnan().any()
    poisoned["q"][0, 2, 1], poisoned["k"][1, 0, 4] = clean["q"][0, 2, 1], clean["k"][1, 0, 4]
    for n in "qkv":
        torch.testing.assert_close(poisoned[n], clean[n])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1e-4, 6e4])
def test_the_ends_of_half_precision(backend, dtype, magnitude):
    """Squares of fp16's largest values pass its range, and those of small ones vanish there; sums are taken in fp32."""
    inputs = tensors(2, 40, 2, 16, dtype)
    inputs["qkv"] = (inputs["qkv"].clamp(-1, 1) * magnitude).to(dtype)
    results = check(inputs, 2, backend)
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens_give_empty_results_and_zero_sums(backend, shape):
    results = run(tensors(*shape), 3, backend)
    assert results["q"].shape == (shape[0], 3, shape[1], 8)
    for n in ("d_q_weight", "d_k_weight", "d_bias"):
        assert not results[n].any()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("frozen", [("qkv",), ("q_weight",), ("k_weight", "bias"), ("q_weight", "k_weight", "bias")])
def test_frozen_inputs_change_no_other_gradient(backend, frozen):
    inputs = tensors()
    leaves = {n: t.to(device_of(backend)) for n, t in inputs.items()}
    for n, leaf in leaves.items():
        leaf.requires_grad_(n not in (*frozen, "cos", "sin"))
    outputs = call(leaves, 3, backend)
    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    expected = run(inputs, 3, backend)
    for n, leaf in leaves.items():
        assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad.cpu(), expected[f"d_{n}"])


@pytest.mark.parametrize("backend", FUSED)
def test_one_result_alone_has_a_gradient(backend):
    inputs = {n: t.to(device_of(backend)) for n, t in tensors().items()}
    leaf = inputs["qkv"].requires_grad_()
    _, k, _ = call(inputs, 3, backend)
    (gradient,) = torch.autograd.grad(k.sum(), leaf)
    kinds = gradient.unflatten(-1, (3, 3, 8)).abs().sum((0, 1, 3, 4))
    assert (kinds > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("backend", FUSED)
def test_the_bias_gets_the_gradient_of_a_projections(backend):
    """The projection adds the bias detached; its gradient comes with the same pass, in its own dtype."""
    inputs = {n: t.to(device_of(backend)) for n, t in tensors().items()}
    x, weight = torch.randn(2, 5, 4, device=inputs["qkv"].device), torch.randn(72, 4, device=inputs["qkv"].device)
    gradients = []
    for given in (True, False):
        bias = inputs["bias"].clone().requires_grad_()
        qkv = F.linear(x, weight, bias.detach() if given else bias)
        outputs = call({**inputs, "qkv": qkv.requires_grad_(), "bias": bias if given else None}, 3, backend)
        gradients.append(torch.autograd.grad(sum(t.square().sum() for t in outputs), bias)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.threads
@pytest.mark.parametrize("backend", FUSED)
def test_results_are_deterministic(backend):
    inputs = tensors(2, 20 if backend == "triton" else 300)
    grads = [torch.randn(2, 3, inputs["qkv"].shape[1], 8) for _ in range(3)]
    first = run(inputs, 3, backend, grads)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for n, result in run(inputs, 3, backend, grads).items():
                assert torch.equal(result, first[n])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_outputs_are_those_of_their_parts(dtype, poisoned_memory):
    """From 8 MB on the CPU kernels write past the cache where heads are aligned, by other instructions."""
    if FUSED[0].marks:
        pytest.skip("no C++ kernels")
    inputs = tensors(6, 400, 16, 64, dtype)
    grads = [torch.randn(6, 16, 400, 64).to(dtype) for _ in range(3)]
    whole = run(inputs, 16, "cpp", grads)
    for sample in range(6):
        part = run(
            {**inputs, "qkv": inputs["qkv"][sample : sample + 1]}, 16, "cpp", [g[sample : sample + 1] for g in grads]
        )
        for n in ("q", "k", "d_qkv"):
            assert torch.equal(whole[n][sample], part[n][0])


ONES = torch.linspace(0.5, 1.5, 4)
CALLS = {
    "qk_norm_rope": lambda x, backend: torch.cat(
        qk_norm_rope(
            torch.cat([x, 2 * x, x], dim=-1),
            ONES.to(x.dtype),
            ONES.flip(0).to(x.dtype),
            *(t.to(torch.promote_types(x.dtype, torch.float32)) for t in rotary_positions((4,), 4)),
            2,
            eps=0.1,
            backend=backend,
        )
    ),
}


def raw_samples(backend):
    """Arguments of every raw op, for test_registry.py."""
    inputs = {n: t.to(device_of(backend)) for n, t in tensors(2, 3, 2, 8).items()}
    qkv, *parts = (inputs[n] for n in NAMES[:5])
    grads = [torch.randn(2, 3, 2, 8, device=qkv.device).transpose(1, 2) for _ in range(3)]
    yield "qk_norm_rope_forward", (qkv, *parts, 2, 1e-6, False, True)
    yield "qk_norm_rope_forward", (qkv, None, None, *parts[2:], 2, 1e-6, False, False)
    yield "qk_norm_rope_backward", (*grads, qkv, *parts, 1e-6, True, True, True, True)
    yield "qk_norm_rope_backward", (*grads, None, None, None, *parts[2:], 1e-6, False, False, False, False)


@pytest.mark.parametrize("backend", [backend for backend in FUSED if backend.values != ("triton",)])
def test_raw_ops_refuse_inputs_that_the_edge_would_have_caught(backend):
    """The Triton launcher alone trusts the Python edge."""
    inputs = {n: t.to(device_of(backend)) for n, t in tensors(2, 3, 2, 8).items()}
    good = [*(inputs[n] for n in NAMES[:5]), 2, 1e-6, False, True]
    for place, bad, match in (
        (0, inputs["qkv"].double(), "takes float32, bfloat16 or float16"),
        (0, inputs["qkv"][0], "qkv must be"),
        (1, None, "q_weight and k_weight belong together"),
        (1, inputs["q_weight"].half(), "q_weight must be contiguous float32"),
        (3, inputs["cos"][:2], "cos must be contiguous float32, one value for each channel of a head and position"),
        (5, 5, "qkv must be"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op.FORWARD[backend](*good[:place], bad, *good[place + 1 :])
    grad = torch.randn(2, 2, 3, 8, device=inputs["qkv"].device)
    rest = [*(inputs[n] for n in NAMES[1:5]), 1e-6, False, True, True, True]
    for grads, qkv, match in (
        ((grad, grad[:1], grad), inputs["qkv"], "differ in dimension 0"),
        ((grad, grad, grad.half()), inputs["qkv"], "must have the dtype of d_q"),
        ((grad, grad, grad), None, "the gradient of a norm needs qkv"),
        ((grad, grad, grad), inputs["qkv"][:, :2], "of the gradients' sizes"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op.BACKWARD[backend](*grads, qkv, *rest)


@pytest.mark.parametrize("backend", FUSED)
def test_fullgraph_compile_equals_eager_and_does_not_recompile(backend):
    torch._dynamo.reset()
    inputs = {n: t.to(device_of(backend)) for n, t in tensors().items()}
    leaves = [inputs[n].requires_grad_() for n in ("q_weight", "k_weight", "bias")]

    def step(qkv, cos, sin):
        return qk_norm_rope(2 * qkv, *leaves[:2], cos, sin, 3, bias=leaves[2], backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 3), (4, 5), (6, 7)):
            given = tensors(batch, tokens)
            qkv, cos, sin = (given[n].to(leaves[0].device) for n in ("qkv", "cos", "sin"))
            qkv.requires_grad_()
            outputs = [run(qkv, cos, sin) for run in (compiled, step)]
            gradients = [torch.autograd.grad(sum(t.square().sum() for t in o), [qkv, *leaves]) for o in outputs]
            torch.testing.assert_close(*outputs, rtol=0, atol=0)
            for a, e in zip(*gradients, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", FUSED)
def test_second_derivatives_are_an_error(backend):
    inputs = {n: t.to(device_of(backend)) for n, t in tensors().items()}
    leaf = inputs["qkv"].requires_grad_()
    q, _, _ = call(inputs, 3, backend)
    (gradient,) = torch.autograd.grad(q.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("isa", LOWER_INSTRUCTION_SETS)
def test_lower_instruction_sets_pass_the_same_tests(isa):
    run_on_lower_instruction_set(isa, __file__, "cpp and (values_and or width or missing) or large and float32")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"num_heads": 5}, ValueError, "3 · 5 heads · head width, got 72"),
        ({"num_heads": 0}, ValueError, "3 · 0 heads"),
        ({"qkv": torch.ones(5, 72)}, ValueError, r"qkv must be \(B, N, 3·H·E\), got \(5, 72\)"),
        ({"qkv": torch.ones(2, 5, 72, dtype=torch.long)}, TypeError, "qkv must be .*int64"),
        ({"q_weight": None}, ValueError, "q_weight is missing; give both q_weight and k_weight, or neither"),
        ({"sin": None}, ValueError, "sin is missing; give both cos and sin, or neither for no rotation"),
        ({"k_weight": torch.ones(9)}, ValueError, r"k_weight \(9,\) must have the shape \(8,\)"),
        ({"k_weight": torch.ones(8).int()}, TypeError, "k_weight must be float32.*int32"),
        ({"cos": torch.ones(4, 8)}, ValueError, r"cos \(4, 8\) must have the shape \(5, 8\): one row for each token"),
        ({"sin": torch.ones(5, 4)}, ValueError, r"sin \(5, 4\) must have the shape \(5, 8\)"),
        ({"cos": torch.ones(5, 8).half()}, TypeError, "cos must be float32, got torch.float16; positions lose"),
        ({"cos": torch.ones(5, 8, requires_grad=True)}, ValueError, r"cos is not differentiated; detach\(\) it"),
        ({"cos": torch.ones(5, 8, device="meta")}, ValueError, "cos is on meta and qkv on cpu"),
        ({"num_heads": 8}, ValueError, "heads of 3 channels; a rotation takes pairs"),
        ({"bias": torch.ones(71)}, ValueError, r"bias \(71,\) must have the shape \(72,\)"),
        ({"norm": "batch"}, ValueError, "unknown norm='batch'; expected 'rms' or 'layer'"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(change, error, match):
    arguments = {**tensors(), "num_heads": 3, **change}
    width = 3 if change.get("num_heads") == 8 else 8
    if width == 3:
        arguments |= {n: torch.ones(3) for n in ("q_weight", "k_weight")} | {
            n: torch.ones(5, 3) for n in ("cos", "sin")
        }
    with pytest.raises(error, match=match):
        qk_norm_rope(**arguments)


def test_heads_wider_than_the_kernels_take():
    inputs = without(tensors(1, 2, 1, 258), "bias")
    if FUSED[0].marks:
        pytest.skip("no C++ kernels")
    with pytest.raises(ValueError, match="heads of 258 channels; the kernels take at most 256"):
        call(inputs, 1, "cpp")
    assert call(inputs, 1, "reference")[0].shape == (1, 1, 2, 258)
