"""Copies of tensors in the memory of the host."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

Named = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, in groups by name."""


class Copies:
    """Copies tensors to the host, of divided ones this process's part.

    On a GPU the memory of the copies is pinned, and the copying has a stream of its own, which does not wait for what
    the device was asked to do before. It is for one call, from whatever thread: PyTorch 2.11 closes its stager behind
    it.

    Args:
        device: where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=gpu, use_non_blocking_copy=gpu
            )
        )

    def make(self, tensors: Named) -> Named:
        """The copies, once they are made."""
        try:
            copies = self._stager.stage(dict(tensors))
            return copies.result() if isinstance(copies, Future) else copies
        finally:
            self._stager.close()
