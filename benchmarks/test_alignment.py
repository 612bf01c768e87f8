"""The family's losses beside the code that published them, forward and backward, batch 64; and a projector's last layer
beside the matrix products in it, which no fusion can spare.

pytest benchmarks/test_alignment.py --benchmark-enable --benchmark-group-by=param:dtype,func
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layersync_kernels import RepresentationAlignmentLoss
from layersync_kernels.bench.cases import Case, provider
from layersync_kernels.functional import dispersive_loss, projected_alignment_loss
from layersync_kernels.ops.dispersive import dispersive_loss_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (64, 256, 768)


def published_repa(projected, teacher):
    """REPA's loop over samples."""
    loss = 0.0
    for t, z in zip(teacher, projected, strict=True):
        loss = loss - (F.normalize(t, dim=-1) * F.normalize(z, dim=-1)).sum(dim=-1).mean()
    return loss / len(teacher)


def measure(benchmark, loss, dtype, constants):
    """Time forward and backward."""
    hidden, *constants = (torch.randn(SHAPE, device=DEVICE, dtype=dtype) for _ in range(1 + constants))
    hidden.requires_grad_()

    def call():
        hidden.grad = None
        loss(hidden, *constants).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["published", "fused"])
def test_repa(benchmark, name, dtype):
    """REPA's loss of projected tokens."""
    module = RepresentationAlignmentLoss(SHAPE[-1], SHAPE[-1], projector=nn.Identity(), weights=1.0)
    loss = published_repa if name == "published" else lambda hidden, teacher: module({8: hidden}, teacher)
    measure(benchmark, loss, dtype, constants=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["published", "fused"])
def test_dispersive(benchmark, name, dtype):
    """The dispersive loss."""
    measure(benchmark, dispersive_loss_reference if name == "published" else dispersive_loss, dtype, constants=0)


def products(hidden, weight, bias, teacher):
    """The three products of a linear layer and its gradients, and nothing else."""
    torch.addmm(bias, hidden, weight.t())
    teacher @ weight
    teacher.t() @ hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["eager", "unfused", "fused", "products"])
def test_projected(benchmark, name, dtype):
    """A projector's last layer with its loss, at 8192 x 1152 -> 768."""
    case = Case("projected_alignment", 8192, 1152, dtype, DEVICE)
    inputs = case.inputs(seed=0)
    inputs = [x.detach().flatten(0, -2).requires_grad_(x.requires_grad) if x.dim() > 1 else x for x in inputs]
    losses = {"eager": provider("eager", case), "unfused": provider("unfused", case), "fused": projected_alignment_loss}

    def call():
        if name == "products":
            with torch.no_grad():
                products(*inputs)
        else:
            torch.autograd.grad(losses[name](*inputs), inputs[:-1])
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
