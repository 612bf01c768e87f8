"""How fast a run is, from record to record."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...compiler.cards import card_of
from ..batch import Batch
from ..distributed.processes import Processes
from ..models.flops import training_flops
from ..models.sit import SiT


class Pace:
    """Counts tokens, and makes rates of them.

    Args:
        model: that is trained.
        device: of this process.
        autocast_dtype: None for fp32.
        processes: whose work is added up.
    """

    def __init__(
        self, model: SiT, device: torch.device, autocast_dtype: torch.dtype | None, processes: Processes
    ) -> None:
        self._model, self._device, self._processes = model, device, processes
        self._tokens: int | Tensor = 0  # a sum of lengths stays on the device
        card = card_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._peak = None if card is None else 1e12 * card.teraflops[autocast_dtype or torch.float32] * processes.world

    def count(self, batch: Batch) -> None:
        """Adds the tokens of a batch; nothing is read from the device."""
        lengths, extent = batch.condition.lengths, batch.samples.shape[2:]
        if lengths is None:
            self._tokens = self._tokens + len(batch) * math.prod(self._model.grid_of(extent))
        else:
            self._tokens = self._tokens + self._model.token_lengths(lengths, extent).sum()

    def read(self, samples: int, seconds: float, waited: float) -> dict[str, float]:
        """The rates since the last call; all processes ask for them.

        Args:
            samples: of all processes.
            seconds: that they took.
            waited: of these, how many this process waited for data.

        Returns:
            "samples_per_second" and "tokens_per_second" of all processes; "data_wait", the share of the time that the
            process waited which did so longest; on a GPU "peak_memory_gb", the most that one has allocated so far; and
            "mfu", model FLOPs over what the devices can do, where that is known.
        """
        tokens = float(self._processes.sum(torch.as_tensor(self._tokens, device=self._device)))
        self._tokens = 0
        gpu = self._device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self._device) / 2**30 if gpu else 0.0
        waited, memory = self._processes.largest(waited, memory)
        rates = {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds}
        rates["data_wait"] = waited / seconds
        if gpu:
            rates["peak_memory_gb"] = memory
        if self._peak is not None:
            rates["mfu"] = training_flops(self._model) * rates["samples_per_second"] / self._peak
        return rates
