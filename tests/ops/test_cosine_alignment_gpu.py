"""What needs a card to be tested: streams, graphs, devices, kernels launched, offsets beyond 32 bits."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from layersync_kernels import layersync_loss

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", ["cuda", "triton"])]


def pair(*shape, dtype=torch.bfloat16, device="cuda"):
    student, teacher = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def step(student, teacher, backend, **kwargs):
    """Loss and gradient."""
    loss = layersync_loss(student, teacher, backend=backend, **kwargs)
    return loss, *torch.autograd.grad(loss, student)


def test_graph_replays_with_new_inputs(backend):
    student, teacher = pair(4, 64, 1152)
    mask = torch.rand(4, 64, device="cuda") > 0.3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and warm up outside of the capture
        step(student, teacher, backend, mask=mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(student, teacher, backend, mask=mask)
    for _ in range(3):
        with torch.no_grad():
            student.normal_()
            teacher.normal_()
            mask.logical_not_()
        graph.replay()
        for replayed, eager in zip(captured, step(student, teacher, backend, mask=mask), strict=True):
            assert torch.equal(replayed, eager)


def test_runs_on_the_current_stream(backend):
    student, teacher = torch.zeros(64, 256, 1152, device="cuda"), torch.ones(64, 256, 1152, device="cuda")
    step(student.clone().requires_grad_(), teacher, backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # who does not wait for this stream reads zeros, and finds a cosine of 0
        student.fill_(1)
        loss, _ = step(student.requires_grad_(), teacher, backend)
    stream.synchronize()
    torch.testing.assert_close(loss.item(), -1.0, rtol=0, atol=1e-6)


def test_does_not_wait_for_the_card(backend):
    student, teacher = pair(8, 256, 1152)
    mask = torch.rand(8, 256, device="cuda") > 0.3
    step(student, teacher, backend, mask=mask)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(student, teacher, backend, mask=mask)
        step(student, teacher, backend, reduction="sum")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_launches_two_kernels_forward_and_one_backward(backend):
    student, teacher = pair(8, 256, 1152)
    step(student, teacher, backend)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        loss = layersync_loss(student, teacher, backend=backend)
        grad = torch.ones_like(loss)
        torch.cuda.synchronize()
        torch.autograd.grad(loss, student, grad)
        torch.cuda.synchronize()
    on_card = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    own = [name for name in on_card if any(word in name for word in ("cosine", "forward_", "finish_", "backward_"))]
    assert len(own) == 3, on_card
    assert len(on_card) <= 4, on_card  # beside them at most the fill of `grad`


def test_follows_the_tensors_to_another_device(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    student, teacher = pair(4, 64, 384, device="cuda:1")
    loss, grad = step(student, teacher, backend)
    assert loss.device == grad.device == student.device
    exact = -torch.cosine_similarity(student.double(), teacher.double(), dim=-1).mean()
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=1e-6)
    assert torch.cuda.current_device() == 0


def test_offsets_beyond_32_bits(backend):
    rows, width = 66_000, 32_768  # 2.16e9 elements
    if torch.cuda.mem_get_info()[0] < 5 * rows * width * 2:
        pytest.skip("needs 22 GB of free memory")
    student = torch.ones(rows, width, dtype=torch.bfloat16, device="cuda")
    teacher = torch.ones_like(student)
    teacher[-1] = -1
    loss = layersync_loss(student, teacher, reduction="none", backend=backend)
    assert loss[:-1].sub(-1).abs().max() < 1e-6
    assert abs(loss[-1] - 1) < 1e-6
    teacher[-1, ::2] = 1  # cosine 0 in the last row: it alone has a gradient
    _, grad = step(student.requires_grad_(), teacher, backend, reduction="sum")
    torch.testing.assert_close(grad[-1].float().abs(), torch.full((width,), 1 / width, device="cuda"))
    assert grad[:-1].abs().max() < 1e-7


@pytest.mark.parametrize("width", [384, 1152, 8192])
def test_agrees_with_the_reference_on_the_card(backend, width):
    student, teacher = pair(1024, width)
    teacher = teacher + student.detach()
    loss, grad = step(student, teacher, backend)
    exact = step(student.detach().double().requires_grad_(), teacher.double(), "reference")
    torch.testing.assert_close(loss.double(), exact[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact[1], rtol=2**-8, atol=1e-9)
