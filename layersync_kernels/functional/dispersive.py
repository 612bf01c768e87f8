"""Dispersion of a batch."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.dispersive import dispersive_loss as _dispersive_loss
from .checks import check_positive, check_tokens


def dispersive_loss(
    hidden: Tensor, *, temperature: float = 1.0, gather: dist.ProcessGroup | Literal["world"] | None = None
) -> Tensor:
    r"""Drives the samples of a batch apart: the log of the mean affinity of all pairs, without a teacher.

    .. math:: L = \log \frac{1}{B^2} \sum_{i,j} \exp\left(-\frac{\lVert h_i - h_j\rVert^2}{K\tau}\right)

    All B·B pairs count, a sample with itself too. Matrix products forward and backward, fp32 whatever the dtype (on a
    GPU TF32, where that is allowed), of the samples less their mean: an offset of all samples costs no digits. Memory
    beyond the gradient: (B, B).

    Args:
        hidden: (B, ...), K elements a sample, usually (B, N, D); float32, bfloat16, float16 or float64.
        temperature: τ.
        gather: a process group, or "world": the pairs are those of the batches of all its processes, which must be
            equally large. Each gets the same loss, and its gradient is scaled so that the average over the processes,
            as DDP makes it, is the gradient of that loss for the whole batch; do not scale either of them.

    Returns:
        0-d, fp32 (fp64 for fp64 inputs), between -log B and 0. A batch of one has nothing to part from: 0, gradient 0;
        so has an empty one.

    Raises:
        ValueError: temperature that is not positive.
        TypeError: a tensor that is not dense or not floating point.
        RuntimeError: `gather` without torch.distributed; double backward.

    Source: Wang and He 2025, Diffuse and Disperse, arXiv:2506.09027 (its L2 form, as published in PyTorch).
    """
    check_tokens("dispersive_loss", "hidden", hidden)
    check_positive("dispersive_loss", "temperature", temperature)
    if gather is not None and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("dispersive_loss: gather needs torch.distributed.init_process_group, or leave it out")
    if hidden.numel() == 0:
        return hidden.sum(dtype=torch.promote_types(hidden.dtype, torch.float32))
    group = None if gather == "world" else gather
    return _dispersive_loss(hidden.reshape(hidden.shape[0], -1), temperature, group, gather is not None)
