"""gated_residual_norm, its parts and its alignment on every backend that runs here, against the fp64 reference."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from layersync_kernels import functional, layersync_loss
from layersync_kernels.functional.seam import aligned_residual_norm, gated_residual_norm, modulated_layer_norm
from layersync_kernels.ops.gated_residual_norm import op

from ..support.backends import (
    ALL,
    FUSED,
    HAS_GPU,
    LOWER_INSTRUCTION_SETS,
    STRIDED,
    assert_as_exact_as,
    device_of,
    each_backend,
    moved,
    run_on_lower_instruction_set,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

SEAM = ("x", "branch", "gate", "shift", "scale")
OPS = {  # name: function, inputs, outputs
    "layer_norm": (functional.modulated_layer_norm, ("x", "shift", "scale"), ("normed",)),
    "rms_norm": (functional.modulated_rms_norm, ("x", "shift", "scale"), ("normed",)),
    "residual": (functional.gated_residual, ("x", "branch", "gate"), ("residual",)),
    "residual_layer_norm": (gated_residual_norm, SEAM, ("residual", "normed")),
    "residual_rms_norm": (functools.partial(gated_residual_norm, norm="rms"), SEAM, ("residual", "normed")),
    "carried_layer_norm": (
        functools.partial(gated_residual_norm, branch=None, gate=None),
        ("x", "shift", "scale"),
        ("residual", "normed"),
    ),
}
DTYPES = {  # name: x, branch, modulation, autocast
    "fp32": (FP32, FP32, FP32, None),
    "bf16": (BF16, BF16, BF16, None),
    "fp16": (FP16, FP16, FP16, None),
    "fp32 stream": (FP32, BF16, BF16, None),
    "fp32 stream, bf16 autocast": (FP32, BF16, BF16, BF16),
    "fp32 stream, fp16 autocast": (FP32, FP16, FP16, FP16),
    "fp32 modulation": (BF16, BF16, FP32, None),
    "fp32 modulation, autocast": (FP32, BF16, FP32, BF16),
    "bf16 stream": (BF16, FP32, FP32, None),
    "both half types": (BF16, FP16, BF16, None),
}
MODULATIONS = {
    "per sample": lambda b, n, d: torch.randn(b, d),
    "per sample, three dimensions": lambda b, n, d: torch.randn(b, 1, d),
    "one for all": lambda b, n, d: torch.randn(d),
    "one for all, three dimensions": lambda b, n, d: torch.randn(1, 1, d),
    "per token": lambda b, n, d: torch.randn(b, n, d),
    "per position": lambda b, n, d: torch.randn(1, n, d),
    "part of a joint projection": lambda b, n, d: torch.randn(b, 6 * d)[:, d : 2 * d],
    "expanded over samples": lambda b, n, d: torch.randn(d).expand(b, d),
    "expanded over tokens": lambda b, n, d: torch.randn(b, 1, d).expand(b, n, d),
    "per token, samples second": lambda b, n, d: torch.randn(n, b, d).transpose(0, 1),
    "channels first": lambda b, n, d: torch.randn(d, b).t(),
}


def tensors(shape, dtypes="fp32", modulation="per sample"):
    """x, branch (B, N, D), gate, shift and scale by name."""
    stream, half, affine, _ = DTYPES[dtypes]
    made = {"x": torch.randn(shape).to(stream), "branch": torch.randn(shape).to(half)}
    return made | {name: MODULATIONS[modulation](*shape).to(affine) for name in SEAM[2:]}


def run(name, inputs, backend, grads=None, autocast=None):
    """Outputs and gradients of one call by name, on fresh leaves that keep the strides."""
    function, names, outputs = OPS[name]
    names = (*names, *(("bias",) if "bias" in inputs else ()))
    device = device_of(backend)
    leaves = {n: None if inputs[n] is None else moved(inputs[n].detach(), device).requires_grad_() for n in names}
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        results = function(**leaves, backend=backend)
    results = dict(zip(outputs, results if isinstance(results, tuple) else (results,), strict=True))
    grads = {n: torch.ones_like(r) if grads is None else grads[n].to(r) for n, r in results.items()}
    wanted = {n: leaf for n, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(list(results.values()), list(wanted.values()), list(grads.values()))
    results |= {f"d_{n}": gradient for n, gradient in zip(wanted, gradients, strict=True)}
    return {n: result.detach().cpu() for n, result in results.items()}


def terms(name, inputs, grads):
    """Bounds of what is subtracted on the way to each result: a row mean from a row, two of them from a gradient."""
    wide = {n: torch.zeros(1) if tensor is None else tensor.double() for n, tensor in inputs.items()}
    expand = {n: wide[n].unsqueeze(1) if wide[n].dim() == 2 else wide[n] for n in SEAM[2:]}
    r = wide["x"] + (expand["gate"] * wide["branch"] if "branch" in OPS[name][1] else 0)
    largest = {n: tensor.abs().max().item() for n, tensor in {**wide, "r": r}.items()}
    d_residual = grads["residual"].abs().max().item() if "residual" in grads else 0.0
    bounds = {"residual": 0.0, "d_shift": 0.0}
    if "normed" in grads:
        centred = r if "rms" in name else r - r.mean(-1, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(-1) + 1e-6).max().item()
        d_normed = grads["normed"].abs().max().item()
        bounds |= {"normed": rstd * largest["r"] * (1 + largest["scale"]), "d_scale": d_normed * rstd * largest["r"]}
        d_residual += rstd * d_normed * (1 + largest["scale"])
    return bounds | {
        "d_x": d_residual, "d_branch": largest["gate"] * d_residual, "d_gate": largest["branch"] * d_residual,
        "d_bias": largest["gate"] * d_residual,
    }  # fmt: skip


def check(name, inputs, backend, *, grads=None, autocast=None):
    """Compare a backend with the truth: the reference in fp64; the yardstick is the reference in the inputs' dtypes."""
    shape = inputs["x"].shape
    grads = {n: torch.randn(shape) for n in OPS[name][2]} if grads is None else grads
    baseline = run(name, inputs, "reference", grads, autocast)
    # What arrives is rounded to the dtype of the outputs, for all three.
    grads = {n: grad.to(baseline[n].dtype) for n, grad in grads.items()}
    actual = run(name, inputs, backend, grads, autocast)
    truth = run(name, {n: None if t is None else t.double() for n, t in inputs.items()}, "reference", grads)
    bounds = terms(name, inputs, grads)
    assert actual.keys() == truth.keys()
    for n, result in actual.items():
        assert result.dtype == baseline[n].dtype
        assert_as_exact_as(result, baseline[n], truth[n], terms=bounds[n])
    return actual


@pytest.mark.parametrize(
    ("backend", "dtypes"), each_backend(DTYPES, ["fp32", "bf16", "fp32 stream, bf16 autocast", "fp32 modulation"])
)
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients(backend, dtypes, name, poisoned_memory):
    shape = (2, 3, 24) if backend == "triton" else (3, 5, 72)
    check(name, tensors(shape, dtypes), backend, autocast=DTYPES[dtypes][3])


@pytest.mark.parametrize(
    ("backend", "modulation"), each_backend(MODULATIONS, ["one for all", "per token", "part of a joint projection"])
)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp32 stream, bf16 autocast"])
def test_modulation_of_any_shape_and_stride(backend, modulation, dtypes, poisoned_memory):
    if backend == "triton" and not HAS_GPU and dtypes != "fp32":
        pytest.skip("slow in Triton's interpreter")
    shape = (2, 3, 8) if backend == "triton" else (3, 4, 40)
    check("residual_layer_norm", tensors(shape, dtypes, modulation), backend, autocast=DTYPES[dtypes][3])


@pytest.mark.parametrize(
    ("backend", "modulation"), each_backend(["per sample", "one for all", "per token", None], ["per sample", None])
)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp32 stream, bf16 autocast"])
@pytest.mark.parametrize("name", ["residual", "residual_rms_norm"])
def test_a_bias_gets_the_gradient_of_the_branch_summed(backend, modulation, dtypes, name, poisoned_memory):
    """In the pass where the sums are few, behind it where each token has a modulation of its own."""
    if backend == "triton" and not HAS_GPU and dtypes == "bf16":
        pytest.skip("slow in Triton's interpreter")
    shape = (2, 19, 8) if backend == "triton" else (3, 300, 40)
    inputs = tensors(shape, dtypes, modulation or "per sample")
    if modulation is None:
        inputs["shift"] = inputs["scale"] = None
        inputs["gate"] = torch.ones(shape[-1], dtype=inputs["gate"].dtype)
    inputs["bias"] = torch.randn(shape[-1]).to(FP32 if name == "residual" else DTYPES[dtypes][1])
    values = check(name, inputs, backend, autocast=DTYPES[dtypes][3])
    del inputs["bias"]
    assert torch.equal(values["residual"], run(name, inputs, backend, autocast=DTYPES[dtypes][3])["residual"])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("forms", [("one for all", "per sample", "per token"), ("per position", "one for all", None)])
def test_modulations_of_different_shapes_go_together(backend, forms):
    shape = (2, 3, 8)
    inputs = tensors(shape)
    for n, form in zip(SEAM[2:], forms, strict=True):
        inputs[n] = None if form is None else MODULATIONS[form](*shape)
    check("residual_layer_norm", inputs, backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("missing", [("shift",), ("scale",), ("shift", "scale")])
def test_missing_modulation_is_zero(backend, missing):
    inputs = {**tensors((2, 3, 24)), **dict.fromkeys(missing)}
    check("residual_layer_norm", inputs, backend)
    check("rms_norm", inputs, backend)


@pytest.mark.parametrize(
    ("backend", "width"), each_backend([1, 3, 16, 31, 33, 131, 384, 1152, 1153, 2500, 9001], [1, 3, 33, 1152])
)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp32 stream, fp16 autocast"])
def test_any_width(backend, width, dtypes, poisoned_memory):
    if backend == "triton" and not HAS_GPU and dtypes != "fp32":
        pytest.skip("slow in Triton's interpreter")
    rows = 2 if backend == "triton" else 7
    for name in ("residual_layer_norm", "rms_norm"):
        check(name, tensors((1, rows, width), dtypes), backend, autocast=DTYPES[dtypes][3])


@pytest.mark.parametrize("backend", FUSED)
def test_many_rows_to_a_sum(backend):
    """Sums of several partials, with rests of every kind."""
    rows = 67 if backend == "triton" else 1031
    check("residual_layer_norm", tensors((1, rows, 8)), backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3, 4), (2, 1, 3, 2)])
def test_any_leading_dimensions(backend, leading):
    if backend == "triton" and not HAS_GPU and len(leading) > 3:
        pytest.skip("slow in Triton's interpreter")
    device = device_of(backend)
    x, branch = torch.randn(2, *leading, 8, device=device).unbind()
    for modulation in (torch.randn(8, device=device), torch.randn(*leading[:1], 8, device=device)):
        residual, normed = gated_residual_norm(x, branch, modulation, modulation, modulation, backend=backend)
        wide = modulation.reshape(*modulation.shape[:-1], *[1] * (len(leading) - modulation.dim() + 1), 8)
        torch.testing.assert_close(residual, x + wide * branch)
        torch.testing.assert_close(normed, F.layer_norm(x + wide * branch, (8,), eps=1e-6) * (1 + wide) + wide)


VIEWS = list(itertools.product(STRIDED, STRIDED))


@pytest.mark.parametrize(("backend", "views"), each_backend(VIEWS, VIEWS[::8]))
def test_row_strides_cost_no_copy(backend, views, poisoned_memory):
    inputs = tensors((3, 4, 40), modulation="part of a joint projection")
    for n, view in zip(("x", "branch"), views, strict=True):
        inputs[n] = moved(STRIDED[view](inputs[n]), device_of(backend))
        assert not inputs[n].is_contiguous()
    for name in ("residual_layer_norm", "layer_norm"):
        with profile() as profiler:
            actual = run(name, inputs, backend)
        copies = {event.name for event in profiler.events()} & {"aten::copy_", "aten::clone"}
        assert not copies or backend != "cpp"  # Triton's interpreter copies its arguments itself; `run` moves to a GPU
        expected = run(name, {n: tensor.contiguous() for n, tensor in inputs.items()}, backend)
        for n, result in actual.items():
            assert torch.equal(result, expected[n])


@pytest.mark.parametrize("backend", FUSED)
def test_layouts_beyond_two_strides_are_copied(backend):
    inputs = tensors((2, 3, 8))
    inputs["x"], inputs["branch"] = torch.randn(8, 2, 3).permute(1, 2, 0), torch.randn(2, 3, 16)[..., ::2]
    check("residual_layer_norm", inputs, backend)


GRADIENTS = {
    "expanded from a number": lambda b, n, d: torch.randn(1, 1, 1).expand(b, n, d),
    "expanded over tokens": lambda b, n, d: torch.randn(b, 1, d).expand(b, n, d),
    "expanded over channels": lambda b, n, d: torch.randn(b, n, 1).expand(b, n, d),
    "channels first": lambda b, n, d: torch.randn(b, d, n).transpose(1, 2),
    "samples second": lambda b, n, d: torch.randn(n, b, d).transpose(0, 1),
    "slice of a concatenation": lambda b, n, d: torch.randn(b, n + 2, 2 * d + 3)[:, 1:-1, d : 2 * d],
}


@pytest.mark.parametrize(("backend", "layout"), each_backend(GRADIENTS, ["expanded over channels", "samples second"]))
def test_gradients_of_any_stride(backend, layout):
    """A gradient that is expanded, transposed or a slice of a cat must not be read as contiguous."""
    shape = (2, 3, 8)
    make = GRADIENTS[layout]
    for name in ("residual_layer_norm", "residual", "layer_norm"):
        check(name, tensors(shape), backend, grads={n: make(*shape) for n in OPS[name][2]})


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 3, 0)])
@pytest.mark.parametrize("name", OPS)
def test_no_rows_or_no_channels_give_empty_results_and_zero_sums(backend, shape, name):
    inputs = tensors(shape)
    results = run(name, inputs, backend)
    for n, result in results.items():
        expected = inputs[n.removeprefix("d_")] if n.startswith("d_") else inputs["x"]
        assert torch.equal(result, torch.zeros_like(expected))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["x", "branch"])
def test_nan_and_infinity_stay_in_their_token(backend, poison, side):
    inputs = tensors((2, 5, 8))
    clean = run("residual_layer_norm", inputs, backend)
    inputs[side][1, 2, 5] = poison
    poisoned = run("residual_layer_norm", inputs, backend)
    others = torch.arange(10).reshape(2, 5) != 7
    for n in ("residual", "normed", "d_x", "d_branch"):
        assert torch.equal(poisoned[n][others], clean[n][others])
    for n in ("normed", "d_x", "d_branch"):
        assert poisoned[n][1, 2].isnan().all()
    assert not poisoned["residual"][1, 2].isfinite()[5]
    assert torch.equal(poisoned["residual"][1, 2, :5], clean["residual"][1, 2, :5])
    for n in ("d_gate", "d_shift", "d_scale"):  # the sums of the other sample
        assert torch.equal(poisoned[n][0], clean[n][0])
    assert poisoned["d_scale"][1].isnan().all()
    assert torch.equal(poisoned["d_shift"], clean["d_shift"])


@pytest.mark.parametrize("backend", FUSED)  # the reference's own gradient underflows from 1e18 on
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [(FP32, 1e10), (FP32, 1e18), (FP32, 1e-20), (FP32, 1e-30), (BF16, 1e18), (BF16, 1e-30), (FP16, 65504.0)],
)
def test_rows_of_extreme_magnitude_are_those_of_layer_norm(backend, dtype, magnitude):
    x = (torch.rand(1, 3, 72).mul(2).sub(1) * torch.tensor([[[1.0], [magnitude], [1.0]]])).to(dtype)
    grad = torch.randn(1, 3, 72).to(dtype)
    actual = run("layer_norm", {"x": x, "shift": torch.zeros(72), "scale": torch.zeros(72)}, backend, {"normed": grad})
    eager = x.float().requires_grad_()
    expected = F.layer_norm(eager, (72,), eps=1e-6)
    (d_x,) = torch.autograd.grad(expected, eager, grad.float())
    for row in range(3):
        largest = d_x[0, row].abs().max().item()
        torch.testing.assert_close(actual["normed"][0, row], expected[0, row], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            actual["d_x"][0, row].float(),
            d_x[0, row],
            rtol=max(1e-4, torch.finfo(dtype).eps),
            atol=1e-5 * largest + torch.finfo(dtype).smallest_normal,
        )


@pytest.mark.parametrize("backend", ALL)
def test_rows_beyond_the_range_of_their_variance_vanish(backend):
    """The variance is infinite, the normed row 0. Eager LayerNorm gives 0 or NaN there, as its summation goes."""
    x = torch.randn(1, 3, 72)
    x[0, 1] *= 1e25
    inputs = {"x": x, "shift": torch.zeros(72), "scale": torch.zeros(72)}
    actual = run("layer_norm", inputs, backend)
    assert torch.equal(actual["normed"][0, 1], torch.zeros(72))
    assert torch.equal(actual["d_x"][0, 1], torch.zeros(72))
    torch.testing.assert_close(actual["normed"][0, ::2], F.layer_norm(x[0, ::2], (72,), eps=1e-6))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("used", ["residual", "normed"])
@pytest.mark.parametrize("name", ["residual_layer_norm", "carried_layer_norm"])
def test_an_output_that_nobody_uses_has_no_gradient(backend, used, name):
    device = device_of(backend)
    function, names, _ = OPS[name]
    inputs, grad = tensors((2, 3, 8)), torch.randn(2, 3, 8)

    def gradients(backend, dtype):
        leaves = {n: inputs[n].to(device, dtype).requires_grad_() for n in names}
        output = function(**leaves, backend=backend)[used == "normed"]
        return torch.autograd.grad(output, list(leaves.values()), grad.to(output), allow_unused=True)

    truth = gradients("reference", torch.float64)
    for actual, baseline, expected in zip(gradients(backend, FP32), gradients("reference", FP32), truth, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_as_exact_as(actual, baseline, expected, terms=10)


@pytest.mark.parametrize(
    ("backend", "frozen"),
    each_backend(
        [n for r in (1, 4) for n in itertools.combinations(SEAM, r)], [("x",), ("x", "gate", "shift", "scale")]
    ),
)
def test_frozen_inputs_change_no_other_gradient(backend, frozen):
    device, inputs = device_of(backend), tensors((2, 3, 8))
    leaves = {n: inputs[n].to(device).requires_grad_(n not in frozen) for n in SEAM}
    outputs = gated_residual_norm(*leaves.values(), backend=backend)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    expected = run("residual_layer_norm", inputs, backend)
    for n, leaf in leaves.items():
        assert leaf.grad is None if n in frozen else torch.equal(leaf.grad.cpu(), expected[f"d_{n}"])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("dtypes", "residual", "normed"),
    [
        ("bf16", BF16, BF16),
        ("fp32 stream", FP32, FP32),
        ("fp32 modulation", FP32, FP32),
        ("both half types", FP32, FP32),
        ("fp32 stream, bf16 autocast", FP32, BF16),
        ("fp32 modulation, autocast", FP32, BF16),
    ],
)
def test_dtypes_are_promoted_as_pytorch_does(backend, dtypes, residual, normed):
    device, autocast = device_of(backend), DTYPES[dtypes][3]
    x, branch, gate, shift, scale = (tensor.to(device) for tensor in tensors((2, 3, 8), dtypes).values())
    eager = x + gate.unsqueeze(1) * branch
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        actual = gated_residual_norm(x, branch, gate, shift, scale, backend=backend)
    assert [tensor.dtype for tensor in actual] == [residual, normed]
    assert eager.dtype == residual
    torch.testing.assert_close(actual[0], eager, rtol=4 * torch.finfo(BF16).eps, atol=0.02)
    with torch.autocast(device, dtype=autocast or BF16):
        assert modulated_layer_norm(x, shift, scale, backend=backend).dtype == autocast or BF16


@pytest.mark.parametrize("backend", ALL)
def test_under_autocast_the_next_linear_layer_sees_what_it_sees_in_eager(backend):
    device = device_of(backend)
    x, branch, gate, shift, scale = (t.to(device) for t in tensors((2, 3, 8), "fp32 stream, bf16 autocast").values())
    with torch.autocast(device, dtype=BF16):
        residual, normed = gated_residual_norm(x, branch, gate, shift, scale, backend=backend)
        expected = x + gate.unsqueeze(1) * branch
        eager = F.layer_norm(expected, (8,), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    assert eager.dtype == FP32
    torch.testing.assert_close(residual, expected, rtol=2 * BF16_EPS, atol=2 * BF16_EPS)  # eager rounds gate·branch
    torch.testing.assert_close(normed, eager.to(BF16), rtol=4 * BF16_EPS, atol=8 * BF16_EPS)


BF16_EPS = torch.finfo(BF16).eps


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "fp32 stream, bf16 autocast"])
@pytest.mark.parametrize("width", [1152, 1160])
@pytest.mark.parametrize("name", OPS)
def test_large_outputs_are_those_of_their_parts(dtypes, width, name, poisoned_memory):
    """From 8 MB on the CPU kernels write past the cache where rows are aligned, by other instructions."""
    inputs, autocast = tensors((16, 260, width), dtypes), DTYPES[dtypes][3]
    grads = {n: torch.randn(16, 260, width) for n in OPS[name][2]}
    whole = run(name, inputs, "auto", grads, autocast)
    for part in torch.arange(16).chunk(4):
        of_part = {n: tensor[part] for n, tensor in inputs.items()}
        expected = run(name, of_part, "auto", {n: grad[part] for n, grad in grads.items()}, autocast)
        for n, result in whole.items():
            if n in ("d_gate", "d_shift", "d_scale"):  # their partials are others
                torch.testing.assert_close(
                    result[part], expected[n], rtol=1e-2 if result.dtype != FP32 else 1e-4, atol=1e-2
                )
            else:
                assert torch.equal(result[part], expected[n])


@pytest.mark.threads
@pytest.mark.parametrize("backend", FUSED)
def test_results_are_deterministic(backend):
    shape = (2, 9, 8) if backend == "triton" else (3, 257, 65)
    inputs = tensors(shape)
    first = run("residual_layer_norm", inputs, backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run("residual_layer_norm", inputs, backend)
            for n, result in again.items():
                assert torch.equal(result, first[n])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtypes", ["fp32", "fp32 stream, bf16 autocast"])
def test_saves_at_most_8_bytes_a_row_beyond_residual_branch_and_modulation(backend, dtypes):
    device, autocast = device_of(backend), DTYPES[dtypes][3]
    inputs = [tensor.to(device).requires_grad_() for tensor in tensors((2, 10, 8), dtypes).values()]
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        residual, normed = gated_residual_norm(*inputs, backend=backend)
    assert {residual.data_ptr(), inputs[1].data_ptr()} <= saved.keys()
    assert not {normed.data_ptr(), inputs[0].data_ptr()} & saved.keys()
    known = {tensor.data_ptr() for tensor in (residual, *inputs)}
    assert 0 < sum(nbytes for pointer, nbytes in saved.items() if pointer not in known) <= 8 * 20


FORWARD_PARTS = {  # branch, gate, shift, scale, student, norm
    "everything": (1, 1, 1, 1, 1, 1),
    "norm alone": (0, 0, 0, 0, 0, 1),
    "modulated norm": (0, 0, 1, 1, 0, 1),
    "norm with a scale": (0, 0, 0, 1, 0, 1),
    "residual alone": (1, 0, 0, 0, 0, 0),
    "gated residual": (1, 1, 0, 0, 0, 0),
    "no modulation": (1, 0, 0, 0, 1, 1),
}
BACKWARD_PARTS = {  # d_residual, d_normed, branch, gate, scale, other, groups and bias
    "everything": (1, 1, 1, 1, 1, 1, 1),
    "only normed": (0, 1, 1, 1, 1, 0, 1),
    "only residual": (1, 0, 1, 1, 1, 0, 1),
    "only the alignment": (0, 0, 1, 1, 1, 1, 1),
    "no sums": (1, 1, 1, 1, 1, 0, 0),
    "modulated norm": (0, 1, 0, 0, 1, 0, 1),
    "norm with a shift": (0, 1, 0, 0, 0, 0, 1),
    "norm alone": (0, 1, 0, 0, 0, 0, 0),
    "residual alone": (1, 0, 1, 0, 0, 0, 0),
}


MODULATION = torch.linspace(-1, 1, 8)
CALLS = {
    "modulated_layer_norm": lambda x, backend: functional.modulated_layer_norm(
        x, MODULATION, MODULATION, backend=backend
    ),
    "modulated_rms_norm": lambda x, backend: functional.modulated_rms_norm(x, None, MODULATION, backend=backend),
    "gated_residual": lambda x, backend: functional.gated_residual(x, x.square(), MODULATION, backend=backend),
    "gated_residual_norm": lambda x, backend: gated_residual_norm(
        x, x.square(), MODULATION, None, MODULATION, backend=backend
    )[1],
    "aligned_residual_norm": lambda x, backend: (
        aligned_residual_norm(x, x.square(), MODULATION, None, None, backend=backend).normed
    ),
}


def raw_samples(backend):
    """Arguments of every raw op, for test_registry.py; of many, Triton's interpreter, which is slow, takes a few."""
    device, few = device_of(backend), backend == "triton" and not HAS_GPU
    x, branch, gate, shift, scale = (tensor.to(device) for tensor in tensors((2, 3, 8), "fp32 stream").values())
    for name, (*given, student, norm) in FORWARD_PARTS.items():
        if few and name not in ("everything", "norm alone"):
            continue
        optional = [t if wanted else None for t, wanted in zip((branch, gate, shift, scale), given, strict=True)]
        yield (
            "gated_residual_norm_forward",
            (x, *optional, x if student else None, bool(norm), False, 1e-6, 1e-6, BF16),
        )
    available = (x, branch, branch, gate, scale, x)
    stats, factors = torch.rand(2, 6, device=device), torch.rand(2, 6, device=device)
    for name, parts in BACKWARD_PARTS.items():
        if few and name not in ("everything", "norm with a shift"):
            continue
        d_residual, d_normed, *given, other = (t if w else None for t, w in zip(available, parts, strict=False))
        yield (
            "gated_residual_norm_backward",
            (
                d_residual, d_normed, x, *given, None if d_normed is None else stats, other,
                None if other is None else factors, False, 2 * parts[-1], bool(parts[-1] and parts[2]),
            ),
        )  # fmt: skip


@pytest.mark.parametrize("backend", [backend for backend in FUSED if backend.values != ("triton",)])
def test_raw_ops_refuse_inputs_that_the_edge_would_have_caught(backend):
    """The Triton launcher alone trusts the Python edge."""
    x, modulation = torch.randn(2, 3, 8, device=device_of(backend)), torch.randn(2, 8, device=device_of(backend))
    for branch, gate, scale, student, norm, dtype, match in (
        (x[:1], None, None, None, True, FP32, "branch and x differ in dimension 0: 1 and 2"),
        (x[0], None, None, None, True, FP32, "branch has 2 dimensions"),
        (x.half(), None, None, None, True, FP32, "branch must have the dtype of the output"),
        (x, modulation[:, :4], None, None, True, FP32, r"gate must have shape \(G, 8\)"),
        (x, modulation, modulation[:1], None, True, FP32, r"scale must have shape \(G, 8\) with one G"),
        (x, modulation.half(), None, None, True, FP32, "must all be float32, or all of the dtype"),
        (x, torch.randn(4, 8, device=x.device), None, None, True, FP32, "4 rows for 6 tokens"),
        (None, modulation, None, None, True, FP32, "a gate without a branch"),
        (x, None, modulation, None, False, FP32, "shift or scale without norm"),
        (x, None, None, x[:, :2], True, FP32, "student and x differ in dimension 1"),
        (x, None, None, None, True, torch.float64, "takes float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op.FORWARD[backend](x, branch, gate, None, scale, student, norm, False, 1e-6, 1e-6, dtype)
    with pytest.raises(RuntimeError, match="without any gradient"):
        op.BACKWARD[backend](None, None, x, x, None, None, None, None, None, False, 1, False)
    with pytest.raises(RuntimeError, match="needs the forward's stats"):
        op.BACKWARD[backend](None, x, x, x, None, None, None, None, None, False, 1, False)
    with pytest.raises(RuntimeError, match="belong together"):
        op.BACKWARD[backend](x, None, x, x, None, None, None, x, None, False, 1, False)
    for branch, groups in ((None, 1), (x, 0)):
        with pytest.raises(RuntimeError, match="a bias without a branch or groups"):
            op.BACKWARD[backend](x, None, x, branch, None, None, None, None, None, False, groups, True)


@pytest.mark.parametrize(
    ("backend", "name"),
    each_backend(["residual_layer_norm", "layer_norm", "residual", "carried_layer_norm"], ["residual_layer_norm"]),
)
@pytest.mark.parametrize("modulation", ["per sample", "one for all"])
def test_fullgraph_compile_equals_eager_and_does_not_recompile(backend, name, modulation):
    torch._dynamo.reset()
    function, names, _ = OPS[name]

    def step(x, *rest):
        outputs = function(**dict(zip(names, (2 * x, *rest), strict=True)), backend=backend)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 3), (4, 5), (6, 2)):
            inputs = tensors((batch, tokens, 8), modulation=modulation)
            leaves = [inputs[n].to(device_of(backend)).requires_grad_() for n in names]
            results = []
            for call in (compiled, step):
                outputs = call(*leaves)
                loss = sum((output * torch.arange(8, device=output.device)).sum() for output in outputs)
                results.append([*outputs, *torch.autograd.grad(loss, leaves)])
            for a, e in zip(*results, strict=True):
                assert torch.equal(a, e)


def test_inductor_keeps_the_op_and_its_numbers():
    torch._dynamo.reset()
    leaves = [tensor.requires_grad_() for tensor in tensors((8, 16, 64)).values()]

    def step(x, *rest):
        residual, normed = gated_residual_norm(x * 2 + 1, *rest)
        return residual.square().sum() + (normed * torch.arange(64)).sum()

    compiled, eager = torch.compile(step, fullgraph=True)(*leaves), step(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, e in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ALL)
def test_functional_gradient(backend):
    inputs = tensors((2, 3, 8))

    def loss(*args):
        return sum(output.sum() for output in gated_residual_norm(*args, backend=backend))

    arguments = [tensor.to(device_of(backend)) for tensor in inputs.values()]
    gradients = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*arguments)
    expected = run("residual_layer_norm", inputs, backend)
    for n, gradient in zip(SEAM, gradients, strict=True):
        torch.testing.assert_close(gradient.cpu(), expected[f"d_{n}"], rtol=0, atol=0)


def pair(x, branch, gate, shift, scale, branch2, *, backend, **options):
    """A student and, one update later, its teacher: both residuals and norms, and the cosine."""
    first = aligned_residual_norm(x, branch, gate, shift, scale, tap=True, backend=backend, **options)
    second = aligned_residual_norm(
        first.residual, branch2, gate, shift, scale, student=first.tap, backend=backend, **options
    )
    return first.residual, first.normed, second.residual, second.normed, second.cosine


def eager_pair(x, branch, gate, shift, scale, branch2):
    """The same by the formulas, with the loss op's cosine."""
    first, normed = gated_residual_norm(x, branch, gate, shift, scale, backend="reference")
    second, normed2 = gated_residual_norm(first, branch2, gate, shift, scale, backend="reference")
    return first, normed, second, normed2, -layersync_loss(first, second, reduction="none", backend="reference")


def run_pair(function, inputs, grads, *, device="cpu", autocast=None, used=range(5), names=(*SEAM, "branch2")):
    """Outputs and gradients, those of outputs that are not used and of inputs that do not matter left out."""
    leaves = {n: moved(inputs[n].detach(), device).requires_grad_() for n in names}
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        outputs = function(*leaves.values())
    gradients = torch.autograd.grad(
        [outputs[i] for i in used], list(leaves.values()), [grads[i].to(outputs[i]) for i in used], allow_unused=True
    )
    return [o.detach().cpu() for o in outputs], {
        n: g.cpu() for n, g in zip(leaves, gradients, strict=True) if g is not None
    }


def pair_inputs(shape, dtypes="fp32"):
    inputs = tensors(shape, dtypes)
    inputs["branch2"] = torch.randn(shape).to(inputs["branch"].dtype)
    return inputs, [*(torch.randn(shape) for _ in range(4)), torch.randn(shape[:-1])]


@pytest.mark.parametrize(
    ("backend", "dtypes"),
    each_backend(["fp32", "bf16", "fp16", "fp32 stream, bf16 autocast", "fp32 modulation"], ["fp32", "bf16"]),
)
@pytest.mark.parametrize("used", [range(5), [4], [2, 4], [0, 4]], ids=["all", "cosine", "teacher too", "student too"])
def test_alignment_is_that_of_the_loss_added_by_hand(backend, dtypes, used, poisoned_memory):
    shape = (2, 3, 8) if backend == "triton" else (3, 5, 72)
    inputs, grads = pair_inputs(shape, dtypes)
    autocast = DTYPES[dtypes][3]
    baseline, baseline_grads = run_pair(eager_pair, inputs, grads, autocast=autocast, used=used)
    grads = [grad.to(output.dtype) for grad, output in zip(grads, baseline, strict=True)]
    function = functools.partial(pair, backend=backend)
    actual, actual_grads = run_pair(function, inputs, grads, device=device_of(backend), autocast=autocast, used=used)
    truth, truth_grads = run_pair(eager_pair, {n: t.double() for n, t in inputs.items()}, grads, used=used)
    assert actual[4].dtype == FP32
    # The cosine is fp32, but that of rows that were rounded to the dtype of the stream.
    rounding = torch.finfo(actual[0].dtype).eps / torch.finfo(FP32).eps
    for a, b, t in zip(actual, baseline, truth, strict=True):
        assert_as_exact_as(a, b, t, terms=rounding if a is actual[4] else 16)
    assert actual_grads.keys() == truth_grads.keys()
    for n, gradient in actual_grads.items():
        assert_as_exact_as(gradient, baseline_grads[n], truth_grads[n], terms=16)


@pytest.mark.parametrize("backend", FUSED)
def test_cosine_equals_the_loss_ops_on_the_same_residuals(backend):
    inputs, _ = pair_inputs((2, 3, 8), "bf16")
    with torch.no_grad():
        student, _, teacher, _, cosine = pair(*(t.to(device_of(backend)) for t in inputs.values()), backend=backend)
    loss = layersync_loss(student, teacher, reduction="none", backend=backend)
    torch.testing.assert_close(cosine, -loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_zero_rows_have_cosine_and_alignment_gradient_zero(backend):
    inputs, grads = pair_inputs((1, 4, 8))
    inputs["gate"] = torch.ones(1, 8)
    for tensor in (inputs["x"], inputs["branch"]):
        tensor[0, 0] = 0  # the student
    inputs["branch2"][0, 1] = -(inputs["x"] + inputs["branch"])[0, 1]  # the teacher
    inputs["x"][0, 2], inputs["branch"][0, 2] = 1e-9, 0  # a student under eps
    function = functools.partial(pair, backend=backend)
    outputs, gradients = run_pair(function, inputs, grads, device=device_of(backend), used=[4])
    assert torch.equal(outputs[4][0, :3], torch.zeros(3))
    assert torch.equal(gradients["x"][0, :3], torch.zeros(3, 8))
    assert outputs[4][0, 3] != 0
    assert gradients["x"][0, 3].abs().max() > 0


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("magnitude", [1e30, 1e15, 1e-3])
def test_alignment_of_rows_of_extreme_magnitude(backend, magnitude):
    """Factors of the gradient near 1e-60 leave fp32's range: such a gradient may vanish, but not be infinite or NaN."""
    inputs, grads = pair_inputs((1, 3, 72), "bf16")
    for n in ("x", "branch", "branch2"):
        inputs[n] = (inputs[n].float() * magnitude).to(BF16)
    function = functools.partial(pair, backend=backend)
    outputs, gradients = run_pair(function, inputs, grads, device=device_of(backend), used=[4])
    first = inputs["x"].double() + inputs["gate"].double().unsqueeze(1) * inputs["branch"].double()
    student = first.to(BF16).double().requires_grad_()
    teacher = student.detach() + inputs["gate"].double().unsqueeze(1) * inputs["branch2"].double()
    cosine = -layersync_loss(student, teacher.to(BF16).double(), reduction="none")
    (expected,) = torch.autograd.grad(cosine, student, grads[4].double())
    torch.testing.assert_close(outputs[4].double(), cosine.detach(), rtol=1e-2, atol=1e-3)
    atol = 4 * BF16_EPS * expected.abs().max().item() + (1e-29 if magnitude == 1e30 else 0)
    torch.testing.assert_close(gradients["x"].double(), expected, rtol=4 * BF16_EPS, atol=atol)


@pytest.mark.parametrize("backend", FUSED)
def test_a_scaled_loss_gives_scaled_gradients(backend):
    """As with GradScaler: the factors must carry the scale of the loss, exactly where it is a power of two."""
    inputs, grads = pair_inputs((2, 3, 8))
    function = functools.partial(pair, backend=backend)
    device = device_of(backend)
    _, expected = run_pair(function, inputs, grads, device=device)
    _, scaled = run_pair(function, inputs, [2.0**16 * grad for grad in grads], device=device)
    for n, gradient in scaled.items():
        assert torch.equal(gradient / 2.0**16, expected[n])


@pytest.mark.parametrize("backend", FUSED)
def test_a_tap_used_twice_gives_nan_not_a_wrong_gradient(backend):
    inputs, _ = pair_inputs((2, 3, 8))
    x, branch, gate, shift, scale, branch2 = (t.to(device_of(backend)).requires_grad_() for t in inputs.values())
    first = aligned_residual_norm(x, branch, gate, shift, scale, tap=True, backend=backend)
    cosines = [
        aligned_residual_norm(first.residual, b, gate, shift, scale, student=first.tap, backend=backend).cosine
        for b in (branch2, 2 * branch2)
    ]
    (d_x,) = torch.autograd.grad(sum(cosine.sum() for cosine in cosines), x, retain_graph=True)
    assert d_x.isnan().all()
    (d_x,) = torch.autograd.grad(cosines[0].sum(), x)  # the second call alone does no harm
    assert d_x.isfinite().all()


@pytest.mark.parametrize("backend", FUSED)
def test_nan_in_a_pair_stays_in_its_token(backend):
    inputs, grads = pair_inputs((2, 3, 8))
    function, device = functools.partial(pair, backend=backend), device_of(backend)
    clean, clean_grads = run_pair(function, inputs, grads, device=device)
    inputs["branch2"][1, 2, 5] = float("nan")  # in the teacher, from where it reaches the student's gradient
    poisoned, poisoned_grads = run_pair(function, inputs, grads, device=device)
    others = torch.arange(6).reshape(2, 3) != 5
    for p, c in zip([*poisoned, *map(poisoned_grads.get, ("x", "branch", "branch2"))],
                    [*clean, *map(clean_grads.get, ("x", "branch", "branch2"))], strict=True):  # fmt: skip
        assert torch.equal(p[others], c[others])
    assert poisoned[4][1, 2].isnan()
    assert poisoned_grads["x"][1, 2].isnan().all()


@pytest.mark.parametrize("backend", FUSED)
def test_a_tap_serves_its_own_backend_only(backend):
    x, modulation = torch.randn(2, 3, 8, device=device_of(backend)), torch.randn(2, 8, device=device_of(backend))
    call = functools.partial(aligned_residual_norm, x, x, modulation, modulation, modulation)
    fused, reference = (call(tap=True, backend=name).tap for name in (backend, "reference"))
    with pytest.raises(ValueError, match=f"comes from the reference; this call runs on {backend}"):
        call(student=reference, backend=backend)
    with pytest.raises(ValueError, match="comes from a fused backend; this call runs on the reference"):
        call(student=fused, backend="reference")


@pytest.mark.parametrize("backend", FUSED)
def test_a_pair_compiles_to_one_graph_that_serves_every_batch(backend):
    torch._dynamo.reset()
    step = functools.partial(pair, backend=backend)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 3), (4, 5)):
            inputs, grads = pair_inputs((batch, tokens, 8))
            results = [run_pair(call, inputs, grads, device=device_of(backend)) for call in (compiled, step)]
            for a, e in zip(results[0][0], results[1][0], strict=True):
                assert torch.equal(a, e)
            for n, expected in results[1][1].items():
                assert torch.equal(results[0][1][n], expected)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(backend, use_reentrant):
    inputs, grads = pair_inputs((2, 3, 8))
    plain = functools.partial(pair, backend=backend)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, plain, use_reentrant=use_reentrant)
    leaves = {n: tensor.to(device_of(backend)).requires_grad_() for n, tensor in inputs.items()}
    results = []
    for call in (plain, checkpointed):
        outputs = call(*leaves.values())
        torch.autograd.backward(outputs, [grad.to(output) for grad, output in zip(grads, outputs, strict=True)])
        results.append([leaf.grad for leaf in leaves.values()])
        for leaf in leaves.values():
            leaf.grad = None
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", FUSED)
def test_a_tap_crosses_checkpointed_blocks(backend):
    """A student in one region, its teacher in another: each is run again in the backward pass."""
    inputs, grads = pair_inputs((2, 3, 8))
    region = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)

    def checkpointed(x, branch, gate, shift, scale, branch2):
        call = functools.partial(region, aligned_residual_norm, backend=backend)
        first = call(x, branch, gate, shift, scale, tap=True)
        second = call(first.residual, branch2, gate, shift, scale, student=first.tap)
        return first.residual, first.normed, second.residual, second.normed, second.cosine

    device = device_of(backend)
    _, expected = run_pair(functools.partial(pair, backend=backend), inputs, grads, device=device)
    _, actual = run_pair(checkpointed, inputs, grads, device=device)
    for n, gradient in actual.items():
        assert torch.equal(gradient, expected[n])


@pytest.mark.parametrize("backend", FUSED)
def test_second_derivatives_are_an_error(backend):
    leaves = [tensor.to(device_of(backend)).requires_grad_() for tensor in tensors((2, 3, 8)).values()]
    residual, normed = gated_residual_norm(*leaves, backend=backend)
    (gradient,) = torch.autograd.grad(residual.sum() + normed.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_through_the_reference(name):
    function, names, _ = OPS[name]
    inputs = tensors((2, 3, 4))
    leaves = [inputs[n].double().requires_grad_() for n in names]

    def by_name(*tensors):
        return function(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(by_name, leaves)
    assert torch.autograd.gradgradcheck(by_name, leaves)


def test_fp64_runs_through_the_reference():
    x, modulation = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 8)
    assert modulated_layer_norm(x, modulation, modulation).dtype == torch.float64
    assert modulated_layer_norm(x.float(), modulation.double(), modulation).dtype == torch.float64
    with torch.autocast("cpu", dtype=BF16):
        assert modulated_layer_norm(x, modulation, modulation).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"float64 runs through the reference only"):
        modulated_layer_norm(x, modulation, modulation, backend="cpp")


def test_the_reference_is_adaln():
    x, branch, gate, shift, scale = (tensor.double() for tensor in tensors((2, 3, 8)).values())
    residual, normed = gated_residual_norm(x, branch, gate, shift, scale, eps=1e-3)
    torch.testing.assert_close(residual, x + gate.unsqueeze(1) * branch)
    for norm, expected in (
        ("layer", F.layer_norm(residual, (8,), eps=1e-3)),
        ("rms", F.rms_norm(residual, (8,), eps=1e-3)),
    ):
        _, normed = gated_residual_norm(x, branch, gate, shift, scale, eps=1e-3, norm=norm)
        torch.testing.assert_close(normed, expected * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))


@pytest.mark.parametrize("backend", FUSED)
def test_eps_reaches_the_kernel(backend):
    x, modulation = 0.01 * torch.randn(1, 3, 8, device=device_of(backend)), torch.zeros(8, device=device_of(backend))
    for name, call in (("layer_norm", F.layer_norm), ("rms_norm", F.rms_norm)):
        actual = OPS[name][0](x, modulation, modulation, eps=0.1, backend=backend)
        torch.testing.assert_close(actual, call(x, (8,), eps=0.1))


@pytest.mark.parametrize("isa", LOWER_INSTRUCTION_SETS)
def test_lower_instruction_sets_pass_the_same_tests(isa):
    numbers = "values or modulation or width or rows or strides or nan or large or deterministic or alignment"
    run_on_lower_instruction_set(isa, __file__, f"(cpp or large) and ({numbers}) and not checkpoint")


OTHER = torch.ones(2, 3, 8, device="meta")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.ones(2, 3, 8, dtype=torch.long)}, TypeError, "gated_residual_norm: x must be float32.*int64"),
        ({"x": torch.tensor(1.0)}, ValueError, "x needs a channel dimension"),
        ({"x": [1.0]}, TypeError, "x must be a tensor.*got list"),
        ({"branch": torch.ones(2, 4, 8)}, ValueError, r"branch \(2, 4, 8\) must have the shape of x, \(2, 3, 8\)"),
        ({"branch": torch.ones(2, 3, 8, dtype=torch.complex64)}, TypeError, "branch must be .*complex64"),
        ({"branch": OTHER}, ValueError, "branch is on meta and x on cpu"),
        ({"gate": torch.ones(3, 8)}, ValueError, r"gate of shape \(3, 8\) does not fit x \(2, 3, 8\)"),
        ({"gate": torch.ones(2, 3)}, ValueError, r"expected \(8,\), \(2, 8\), \(2, 1, 8\) or .*, \(2, 3, 8\)"),
        ({"gate": torch.ones(2, 1)}, ValueError, r"gate of shape \(2, 1\) does not fit"),
        ({"shift": torch.ones(2, 7)}, ValueError, "shift of shape"),
        ({"shift": torch.tensor(1.0)}, ValueError, "shift needs a channel dimension"),
        ({"scale": torch.ones(2, 2, 8)}, ValueError, r"scale of shape \(2, 2, 8\) does not fit"),
        ({"scale": torch.ones(1, 2, 3, 8)}, ValueError, "scale of shape"),
        ({"scale": torch.ones(2, 8, dtype=torch.int32)}, TypeError, "scale must be .*int32"),
        ({"scale": torch.ones(2, 8, device="meta")}, ValueError, "scale is on meta and x on cpu"),
        ({"branch": None}, ValueError, "a gate without a branch; give it, or neither"),
        ({"branch": None, "gate": None, "bias": torch.ones(8)}, ValueError, "a bias without a branch"),
        ({"bias": torch.ones(2, 8)}, ValueError, r"bias \(2, 8\) must have the shape \(8,\), the bias of the layer"),
        ({"bias": torch.ones(8).int()}, TypeError, "bias must be float32.*int32"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, "bias is on meta and branch on cpu"),
        ({"norm": "batch"}, ValueError, "unknown norm='batch'; expected 'layer' or 'rms'"),
        ({"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ({"eps": float("nan")}, ValueError, "eps must be positive"),
        ({"backend": "gpu"}, ValueError, "expected one of auto, reference, cpp, triton, cuda"),
    ],
)
def test_bad_input_is_explained(change, error, match):
    arguments = {**tensors((2, 3, 8)), **change}
    with pytest.raises(error, match=match):
        gated_residual_norm(*[arguments.pop(n) for n in SEAM], **arguments)


def test_a_student_of_another_shape_is_explained():
    x, modulation = torch.randn(2, 3, 8), torch.randn(2, 8)
    call = functools.partial(aligned_residual_norm, gate=modulation, shift=modulation, scale=modulation)
    student = call(x[:, :2], x[:, :2], tap=True).tap
    with pytest.raises(ValueError, match=r"student's hidden \(2, 2, 8\) must have the shape of x, \(2, 3, 8\)"):
        call(x, x, student=student)
