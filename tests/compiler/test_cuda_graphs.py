"""mode="reduce-overhead" without a GPU: what we compile is accepted as CUDA graphs, what could not be is refused."""

import pytest
import torch

from layersync_kernels import functional, layersync_loss
from layersync_kernels.analysis import cuda_graph_obstacles
from layersync_kernels.bench.traffic import Provider, training_step
from layersync_kernels.compiler import pretended_gpu

pytestmark = pytest.mark.skipif(pretended_gpu.obstacle() is not None, reason=f"{pretended_gpu.obstacle()}")


def tokens(count=1, dtype=torch.float32):
    return [torch.randn(4, 16, 64, dtype=dtype, requires_grad=True) for _ in range(count)]


def seam():
    (x, branch), modulation = tokens(2), [torch.randn(4, 64, requires_grad=True) for _ in range(3)]
    return lambda: functional.gated_residual_norm(x, branch, *modulation)


def aligned_seams():
    (x, branch), modulation = tokens(2), [torch.randn(4, 64, requires_grad=True) for _ in range(3)]

    def forward():
        first = functional.aligned_residual_norm(x, branch, *modulation, tap=True)
        second = functional.aligned_residual_norm(first.residual, first.normed, *modulation, student=first.tap)
        return second.normed.sum() - second.cosine.mean()

    return forward


def loss():
    student, teacher = tokens(2, torch.bfloat16)
    return lambda: layersync_loss(student, teacher)


def model():
    return training_step(Provider("fused", aligned=True), "SiT-P/8", 2, torch.bfloat16, 2)


@pytest.mark.parametrize("make", [seam, aligned_seams, loss, model], ids=lambda make: make.__name__)
def test_what_we_compile_is_replayed_as_cuda_graphs(make):
    assert cuda_graph_obstacles(make) == []


def mutating():
    (x,), seen = tokens(), torch.zeros(4, 16, 64)

    def forward():
        seen.add_(1)
        return (x * seen).sum()

    return forward


def drawing_on_the_host():
    (x,) = tokens()
    return lambda: (x * torch.rand(3, device="cpu").sum()).sum()


def aliasing():
    (x,) = tokens()
    other = torch.zeros(4, 16, 64)
    return lambda: (x * 2, other[1:])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (mutating, "forward: writes to its inputs"),
        (drawing_on_the_host, "forward: has tensors on the CPU"),
        (aliasing, "forward: its results share memory with its inputs"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_replayed_is_refused(make, reason):
    assert any(obstacle.startswith(reason) for obstacle in cuda_graph_obstacles(make))


def test_a_tensor_on_the_host_does_not_meet_those_of_the_model():
    def make():
        (x,) = tokens()
        return lambda: (x * torch.ones(64, device="cpu")).sum()

    with pytest.raises(Exception, match=r"(?i)device"):
        cuda_graph_obstacles(make)
