"""The block ops on a card: streams, graphs, kernels launched, offsets beyond 32 bits, agreement with the reference."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from layersync_kernels.functional.gelu import gelu_mlp, linear_gelu
from layersync_kernels.functional.seam import gated_residual_norm, modulated_layer_norm
from layersync_kernels.ops.gelu import cublaslt

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", ["cuda", "triton"])]


def seam_inputs(batch=4, tokens=64, width=1152, stream=torch.bfloat16, half_block=torch.bfloat16):
    """x, branch (B, N, D), gate, shift and scale (B, D)."""
    x = torch.randn(batch, tokens, width, device="cuda").to(stream)
    branch = torch.randn(batch, tokens, width, device="cuda").to(half_block)
    modulation = [torch.randn(batch, width, device="cuda").to(half_block) for _ in range(3)]
    return [tensor.requires_grad_() for tensor in (x, branch, *modulation)]


def seam_step(inputs, backend, d_outputs=None):
    """Both outputs and all five gradients."""
    outputs = gated_residual_norm(*inputs, backend=backend)
    d_outputs = [torch.ones_like(output) for output in outputs] if d_outputs is None else d_outputs
    return [*outputs, *torch.autograd.grad(outputs, inputs, d_outputs)]


def gelu_inputs(rows=256, width=1152, hidden=4608, dtype=torch.bfloat16):
    x = torch.randn(rows, width, device="cuda").to(dtype)
    weight = (torch.randn(hidden, width, device="cuda") / width**0.5).to(dtype)
    bias = torch.randn(hidden, device="cuda").to(dtype)
    return [tensor.requires_grad_() for tensor in (x, weight, bias)]


def gelu_step(inputs, backend, d_output=None):
    """Output and all three gradients."""
    output = linear_gelu(*inputs, backend=backend)
    return [output, *torch.autograd.grad(output, inputs, torch.ones_like(output) if d_output is None else d_output)]


STEPS = pytest.mark.parametrize(
    ("make", "step"), [(seam_inputs, seam_step), (gelu_inputs, gelu_step)], ids=["seam", "gelu"]
)


@STEPS
def test_graph_replays_with_new_inputs(backend, make, step):
    inputs = make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and warm up outside of the capture
        step(inputs, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, backend)
    for _ in range(3):
        with torch.no_grad():
            for tensor in inputs:
                tensor.normal_()
        graph.replay()
        for replayed, eager in zip(captured, step(inputs, backend), strict=True):
            assert torch.equal(replayed, eager)


def test_runs_on_the_current_stream(backend):
    x, branch, gate, shift, scale = (tensor.detach() for tensor in seam_inputs(64, 256))
    x, branch = torch.zeros_like(x), torch.ones_like(branch)
    expected = gated_residual_norm(x + 3, branch, gate, shift, scale, backend=backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # who does not wait for this stream reads zeros
        x.fill_(3)
        found = gated_residual_norm(x, branch, gate, shift, scale, backend=backend)
    stream.synchronize()
    for output, exact in zip(found, expected, strict=True):
        assert torch.equal(output, exact)


@STEPS
def test_does_not_wait_for_the_card(backend, make, step):
    inputs = make()
    step(inputs, backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@STEPS
def test_same_bits_every_time(backend, make, step):
    inputs = make()
    first = step(inputs, backend)
    for _ in range(3):
        for one, other in zip(first, step(inputs, backend), strict=True):
            assert torch.equal(one, other)


def test_seam_launches_one_kernel_forward_and_two_backward(backend):
    inputs = seam_inputs(8, 256)
    d_outputs = [torch.ones_like(output) for output in gated_residual_norm(*inputs, backend=backend)]
    seam_step(inputs, backend, d_outputs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        seam_step(inputs, backend, d_outputs)
        torch.cuda.synchronize()
    on_card = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_card) <= 3 + 3, on_card  # beside them at most the casts of three sums


@pytest.mark.parametrize(
    ("stream", "half_block"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
    ids=["fp32", "bf16", "mixed"],
)
@pytest.mark.parametrize("width", [384, 1152, 2048, 3072, 5128, 1155])  # every kernel: registers, blocks, any
def test_seam_agrees_with_the_reference(backend, width, stream, half_block):
    inputs = seam_inputs(4, 100, width, stream, half_block)
    d_outputs = [torch.randn(4, 100, width, device="cuda").to(dtype) for dtype in (stream, half_block)]
    with torch.autocast("cuda", half_block, enabled=stream != half_block):
        found = seam_step(inputs, backend, d_outputs)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = seam_step(wide, "reference", [d.double() for d in d_outputs])
    names = ("r", "y", "dx", "dbranch", "dgate", "dshift", "dscale")
    for name, output, truth in zip(names, found, exact, strict=True):
        # The residual's rounding to its dtype moves everything behind it by a few of its ulp.
        error = (output.double() - truth).abs().max() / truth.abs().max()
        assert error < 8 * torch.finfo(output.dtype).eps + 8 * torch.finfo(stream).eps, (name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("hidden", [4608, 77])
def test_gelu_agrees_with_pytorch_behind_the_same_gemm(backend, dtype, hidden):
    # The identity as weight: the GEMM is exact, and what remains is the op's own error.
    u = torch.randn(300, hidden, device="cuda").to(dtype)
    weight = torch.eye(hidden, device="cuda").to(dtype).requires_grad_()
    bias = torch.zeros(hidden, device="cuda").to(dtype).requires_grad_()
    d_output = torch.randn(300, hidden, device="cuda").to(dtype)
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        output, _, _, d_bias = gelu_step([u.requires_grad_(), weight, bias], backend, d_output)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    wide = u.detach().double().requires_grad_()
    exact = F.gelu(wide, approximate="tanh")
    exact.backward(d_output.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), exact.detach(), rtol=2 * eps, atol=8 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(d_bias.double(), wide.grad.sum(0), rtol=eps, atol=1e-4)


def mlp_inputs(rows=256, width=1152, hidden=4608, dtype=torch.bfloat16):
    shapes = (rows, width), (hidden, width), (hidden,), (width, hidden), (width,)
    return [(torch.randn(s, device="cuda") / s[-1] ** 0.5).to(dtype).requires_grad_() for s in shapes]


def mlp_step(inputs, backend, d_output=None):
    """Output and all five gradients."""
    output = gelu_mlp(*inputs, backend=backend)
    d_output = torch.ones_like(output) if d_output is None else d_output
    return [output, *torch.autograd.grad(output, inputs, d_output)]


class TestEpilogues:
    """GELU in the epilogue of cuBLASLt, which LAYERSYNC_CUBLASLT=1 asks for."""

    @pytest.fixture(autouse=True)
    def _enabled(self, backend, monkeypatch):
        if backend != "cuda":
            pytest.skip("they belong to the backend cuda")
        monkeypatch.setattr(cublaslt, "ENABLED", True)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize(("make", "step"), [(gelu_inputs, gelu_step), (mlp_inputs, mlp_step)], ids=["one", "mlp"])
    @pytest.mark.parametrize(("rows", "width", "hidden"), [(256, 1152, 4608), (77, 384, 1536), (1, 64, 8)])
    def test_agree_with_the_plain_path(self, backend, make, step, rows, width, hidden, dtype, monkeypatch):
        inputs = make(rows, width, hidden, dtype)
        d_output = torch.randn_like(step(inputs, backend)[0])
        found = step(inputs, backend, d_output)
        monkeypatch.setattr(cublaslt, "ENABLED", False)
        plain = step(inputs, backend, d_output)
        exact = step([t.detach().double().requires_grad_() for t in inputs], "reference", d_output.double())
        for one, other, truth in zip(found, plain, exact, strict=True):
            scale = truth.abs().max()
            error, yardstick = ((t.double() - truth).abs().max() / scale for t in (one, other))
            assert error <= 2 * yardstick + 4 * torch.finfo(dtype).eps, (error, yardstick)

    def test_take_views_that_are_not_aligned(self, backend):
        x, weight, bias = (t.detach() for t in gelu_inputs())
        shifted = [F.pad(t.flatten(), (1, 0))[1:].view_as(t) for t in (x, weight, bias)]
        for one, other in zip(cublaslt.FORWARD(*shifted), cublaslt.FORWARD(x, weight, bias), strict=True):
            assert torch.equal(one, other)

    def test_name_what_they_cannot_take(self, backend):
        x, weight, bias = (t.detach() for t in gelu_inputs(hidden=77))
        with pytest.raises(RuntimeError, match=r"weight of shape \(77, 1152\)"):
            cublaslt.FORWARD(x, weight, bias)

    def test_graph_replays_with_new_inputs(self, backend):
        test_graph_replays_with_new_inputs(backend, mlp_inputs, mlp_step)

    def test_do_not_wait_for_the_card(self, backend):
        test_does_not_wait_for_the_card(backend, mlp_inputs, mlp_step)

    def test_give_the_same_bits_every_time(self, backend):
        test_same_bits_every_time(backend, mlp_inputs, mlp_step)

    def test_save_the_passes_over_the_activation(self, backend):
        inputs = [*mlp_inputs()[:3], *(t.detach() for t in mlp_inputs()[3:])]
        output = gelu_mlp(*inputs, backend=backend)
        d_output = torch.ones_like(output)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            output = gelu_mlp(*inputs, backend=backend)
            torch.autograd.grad(output, inputs[:3], d_output)
            torch.cuda.synchronize()
        on_card = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert not any("gelu_forward_kernel" in name or "gelu_backward_kernel" in name for name in on_card), on_card


def test_per_token_modulation(backend):
    x = torch.randn(4, 64, 1152, device="cuda", requires_grad=True)
    shift, scale = (torch.randn(4, 64, 1152, device="cuda", requires_grad=True) for _ in range(2))
    d_output = torch.randn_like(x)
    found, exact = (
        torch.autograd.grad(modulated_layer_norm(x, shift, scale, backend=name), (x, shift, scale), d_output)
        for name in (backend, "reference")
    )
    for gradient, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-4)


def test_offsets_beyond_32_bits(backend):
    rows, width = 528_000, 4096  # 2.16e9 elements
    if torch.cuda.mem_get_info()[0] < 8 * rows * width * 2:
        pytest.skip("needs 35 GB of free memory")
    x = torch.zeros(1, rows, width, dtype=torch.bfloat16, device="cuda")
    x[0, -1, ::2] = 2  # the last row alone has a variance
    ones = torch.ones(1, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    zeros = torch.zeros_like(ones)
    x.requires_grad_()
    y = modulated_layer_norm(x, zeros, ones, backend=backend)  # scale 1: twice the norm
    assert y[0, :-1].abs().max() == 0
    torch.testing.assert_close(y[0, -1].float().abs(), torch.full((width,), 2.0, device="cuda"))
    (d_scale,) = torch.autograd.grad(y, ones, torch.ones(1, 1, 1, dtype=y.dtype, device="cuda").expand_as(y))
    torch.testing.assert_close(d_scale.float().abs(), torch.ones(1, width, device="cuda"))
