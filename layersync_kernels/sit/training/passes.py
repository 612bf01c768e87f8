"""A forward pass with its losses, as one module: what an engine of data parallelism wraps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import WHOLE, Batch, Share
from ..diffusion.transport import Transport
from ..models.sit import Capture, SiT
from .terms.base import Drawn, LossTerm


class Pass(nn.Module):
    """The model and the modules of the terms; called with a part of a batch, it gives its losses.

    Args:
        model: whose prediction and states the losses are of.
        terms: beside the flow's own.
    """

    def __init__(self, model: SiT, terms: Sequence[LossTerm]) -> None:
        super().__init__()
        self.model = model
        self.trained_terms = nn.ModuleList(term.module for term in terms if term.module is not None)

    def forward(
        self,
        part: Batch,
        terms: Sequence[LossTerm],
        targets: Sequence[Any],
        *,
        transport: Transport,
        step: int,
        generator: torch.Generator,
        autocast_dtype: torch.dtype | None,
        share: Share = WHOLE,
    ) -> dict[str, Tensor]:
        """The losses of a part of a batch.

        Args:
            part: what this process has of a pass.
            terms: those that count in this step.
            targets: for each of them, of this part.
            transport: computes the flow's own loss.
            step: optimiser steps done.
            generator: draws noise and times.
            autocast_dtype: None for fp32.
            share: this process's, of a pass.

        Returns:
            "total", from which gradients flow; "loss", the flow's own; "NAME_loss" and the metrics of each term.
        """
        inputs: dict[str, Any] = part.condition.keywords()
        if capture := _captures(terms, self.model.kernels):
            inputs["capture"] = capture
        device = part.samples.device
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            output = transport.training_losses(self.model, part.samples, inputs, generator=generator, share=share)
            total = flow = output["loss"].mean()
            found: dict[str, Tensor] = {"loss": flow.detach()}
            drawn = Drawn(output["t"], output["x0"], transport, share)
            for term, target in zip(terms, targets, strict=True):
                loss = term.loss(output.get("states", {}), term.teach(target, drawn, step), step)
                total = total + loss
                found[f"{term.name}_loss"] = loss.detach()
                found.update(term.metrics())
        return {"total": total, **found}


def _captures(terms: Sequence[LossTerm], kernels: str) -> list[Capture]:
    """What all of them need, once."""
    return list(dict.fromkeys(block for term in terms for block in term.captures(kernels)))
