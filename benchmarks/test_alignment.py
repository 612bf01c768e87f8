"""The family's losses beside the code that published them, without projectors; forward and backward, batch 64.

pytest benchmarks/test_alignment.py --benchmark-enable --benchmark-group-by=param:dtype,func
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layersync_kernels import RepresentationAlignmentLoss
from layersync_kernels.functional import dispersive_loss
from layersync_kernels.ops.dispersive import dispersive_loss_reference
from layersync_kernels.runtime.memory import keep_freed_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (64, 256, 768)
keep_freed_memory()  # as the trainer does; else the CPU's page faults are timed


def published_repa(projected: Tensor, teacher: Tensor) -> Tensor:
    """REPA's loop over samples."""
    loss = projected.new_zeros(())
    for t, z in zip(teacher, projected, strict=True):
        loss = loss - (F.normalize(t, dim=-1) * F.normalize(z, dim=-1)).sum(dim=-1).mean()
    return loss / len(teacher)


def measure(benchmark: Any, loss: Callable[..., Tensor], dtype: torch.dtype, constants: int) -> None:
    """Time forward and backward."""
    hidden, *others = (torch.randn(SHAPE, device=DEVICE, dtype=dtype) for _ in range(1 + constants))
    hidden.requires_grad_()

    def call() -> None:
        hidden.grad = None
        loss(hidden, *others).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["published", "fused"])
def test_repa(benchmark: Any, name: str, dtype: torch.dtype) -> None:
    """REPA's loss of projected tokens."""
    module = RepresentationAlignmentLoss(SHAPE[-1], SHAPE[-1], projector=nn.Identity(), weights=1.0)

    def fused(hidden: Tensor, teacher: Tensor) -> Tensor:
        return module({8: hidden}, teacher)

    measure(benchmark, published_repa if name == "published" else fused, dtype, constants=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["published", "fused"])
def test_dispersive(benchmark: Any, name: str, dtype: torch.dtype) -> None:
    """The dispersive loss."""
    measure(benchmark, dispersive_loss_reference if name == "published" else dispersive_loss, dtype, constants=0)
