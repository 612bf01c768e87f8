"""The family's losses beside the code that published them, without projectors; forward and backward, batch 64.

pytest benchmarks/test_alignment.py --benchmark-enable --benchmark-group-by=param:dtype,func
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layersync_kernels import RepresentationAlignmentLoss
from layersync_kernels.functional.dispersive import dispersive_loss
from layersync_kernels.ops.dispersive import dispersive_loss_reference
from layersync_kernels.runtime.memory import keep_freed_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (64, 256, 768)
keep_freed_memory()  # as the trainer does; else the CPU's page faults are timed


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
