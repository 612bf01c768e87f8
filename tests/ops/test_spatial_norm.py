"""spatial_norm on every backend that runs here, against PyTorch in fp64."""

import pytest
import torch

from layersync_kernels.functional.spatial_norm import spatial_norm
from layersync_kernels.ops import dispatch
from layersync_kernels.ops.spatial_norm import op, spatial_norm_reference

from ..support.backends import (
    ALL,
    FUSED,
    HAS_GPU,
    STRIDED,
    assert_as_exact_as,
    device_of,
    each_backend,
    moved,
    run_on_lower_instruction_set,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def run(x, backend, **kwargs):
    return spatial_norm(moved(x, device_of(backend)), backend=backend, **kwargs).cpu()


def check(x, backend, alpha=1.0, eps=1e-6):
    """Compare a backend with the truth, the reference in fp64; the yardstick is PyTorch in the inputs' dtype."""
    actual = run(x, backend, alpha=alpha, eps=eps)
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()
    assert_as_exact_as(actual, spatial_norm_reference(x, alpha, eps), spatial_norm_reference(x.double(), alpha, eps))
    return actual


def test_the_reference_is_the_published_formula():
    x = torch.randn(3, 7, 5, dtype=torch.float64) + 2
    for alpha in (1.0, 0.6):
        mean = x.sum(dim=1, keepdim=True) / 7
        std = ((x - mean).square().sum(dim=1, keepdim=True) / 6).sqrt()
        torch.testing.assert_close(spatial_norm(x, alpha=alpha, eps=1e-3), (x - alpha * mean) / (std + 1e-3))


SIZES = [(2, 7), (3, 1), (4, 16), (5, 33), (33, 64), (70, 131), (257, 40)]


@pytest.mark.parametrize(("backend", "size"), each_backend(SIZES, [(2, 7), (70, 131)]))
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_number_of_tokens_and_channels(backend, size, dtype, poisoned_memory):
    x = torch.randn(2, *size).to(dtype)
    check(x, backend)
    check(x, backend, alpha=0.6, eps=0.1)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("view", STRIDED)
def test_any_stride(backend, view):
    x = torch.randn(3, 6, 24)
    assert torch.equal(run(STRIDED[view](x), backend), run(STRIDED[view](x).contiguous(), backend))


def test_tokens_behind_a_class_token_are_not_copied():
    x = torch.randn(64, 65, 512)[:, 1:]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        spatial_norm(x, backend="auto")
    assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("backend", ALL)
def test_any_leading_dimensions(backend):
    x = torch.randn(2, 3, 5, 8)
    assert torch.equal(run(x, backend).flatten(0, 1), run(x.flatten(0, 1), backend))
    assert torch.equal(run(x[0, 0], backend), run(x, backend)[0, 0])
    for shape in ((0, 5, 8), (2, 0, 8), (2, 5, 0)):
        assert run(torch.empty(shape), backend).shape == shape


@pytest.mark.parametrize("backend", ALL)
def test_equal_tokens_become_zeros(backend):
    """A sum of equal numbers is not a multiple of them: with a rounded mean they would be anything up to ±1."""
    for value in (0.1, 1000.1, -3e20):
        assert run(torch.full((1, 100, 9), value), backend).abs().max() == 0


@pytest.mark.parametrize("backend", FUSED)
def test_a_mean_far_from_zero_cancels_nothing(backend):
    check(1e3 + torch.randn(2, 100, 40), backend)
    check(1e6 + torch.randint(0, 9, (2, 100, 40)).float(), backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("scale", [1e-9, 1e18, 1e30])
def test_any_magnitude(backend, scale):
    x = torch.randn(2, 50, 40)
    x[0, :, ::3] *= scale  # beside channels of the usual magnitude
    check(x, backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", [0, 7])
def test_nan_and_infinity_stay_in_their_channel_and_sample(backend, value, token):
    x = torch.randn(3, 20, 33)
    clean = run(x, backend)
    x[1, token, 5] = value
    result = run(x, backend)
    assert result[1, :, 5].isnan().all()
    result[1, :, 5] = clean[1, :, 5]
    assert torch.equal(result, clean)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [768, 770])
def test_large_outputs_are_those_of_their_samples(dtype, width, poisoned_memory):
    """From 8 MB on the CPU kernels write past the cache where rows are aligned; threads share samples and channels."""
    backend = dispatch.resolve("spatial_norm", "auto", "cuda" if HAS_GPU else "cpu", dtype)
    x = torch.randn(3, 2000, width).to(dtype)
    whole = check(x, backend)
    for sample, expected in zip(x.split(1), whole.split(1), strict=True):
        assert torch.equal(run(sample, backend), expected)


@pytest.mark.parametrize("backend", FUSED)
def test_a_gradient_that_kernels_do_not_have_is_refused(backend):
    leaf = torch.randn(2, 5, 3, device=device_of(backend), requires_grad=True)
    with pytest.raises(RuntimeError, match=f"spatial_norm: backend='{backend}' cannot run: .* have no gradient"):
        spatial_norm(leaf, backend=backend)
    with torch.no_grad():
        assert torch.equal(spatial_norm(leaf, backend=backend), spatial_norm(leaf.detach(), backend=backend))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_gradient_goes_through_the_reference(backend):
    x = torch.randn(2, 5, 3, device=device_of(backend))
    leaf = x.clone().requires_grad_()
    output = spatial_norm(leaf, backend=backend)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaf)
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(spatial_norm_reference(wide, 1.0, 1e-6).square().sum(), wide)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert not spatial_norm(leaf, backend=backend).requires_grad


CALLS = {"spatial_norm": lambda x, backend: spatial_norm(x, backend=backend)}


def raw_samples(backend):
    """Arguments of the raw op, for test_registry.py."""
    x = torch.randn(2, 6, 8, device=device_of(backend))
    yield "spatial_norm", (x[:, 1:], 0.6, 1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_fullgraph_compile_equals_eager_and_does_not_recompile(backend):
    torch._dynamo.reset()

    def step(x):
        return spatial_norm(2 * x, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 3), (4, 5), (6, 7)):
            x = torch.randn(batch, tokens, 8, device=device_of(backend))
            assert torch.equal(compiled(x), step(x))


def test_bad_input_is_an_error_that_says_what_to_do():
    x = torch.randn(2, 5, 8)
    for bad, kwargs, error, match in (
        (x[:, :1], {}, ValueError, "one token has no standard deviation"),
        (x[0, 0], {}, ValueError, r"shape \(\.\.\., N, D\), got \(8,\)"),
        (x, {"eps": 0.0}, ValueError, "eps must be at least 1e-12, got 0.0"),
        (x, {"eps": float("nan")}, ValueError, "eps must be at least"),
        (x.int(), {}, TypeError, "float32, bfloat16, float16 or float64"),
        (x.double(), {"backend": "triton"}, RuntimeError, "reference only"),
    ):
        with pytest.raises(error, match=match):
            spatial_norm(bad, **kwargs)
    for backend in ("cpp", "cuda"):
        device = device_of(backend)
        if device == "cpu" or HAS_GPU:
            for bad, match in ((x[0], "shape"), (x[:, :1], "one token"), (x.double(), "takes float32")):
                with pytest.raises(RuntimeError, match=match):
                    op.SPATIAL_NORM[backend](bad.to(device), 1.0, 1e-6)


def test_a_lower_instruction_set():
    """Of two vectors with eight lanes the one that is not plain C++."""
    run_on_lower_instruction_set("avx2", __file__, "cpp and (tokens_and_channels or magnitude)")
