"""One optimiser step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..diffusion.transport import Transport
from ..models.sit import Capture
from .runlog import Meter
from .state import TrainState
from .terms.base import LossTerm


def train_step(
    state: TrainState,
    batch: Batch,
    transport: Transport,
    *,
    learning_rate: float,
    autocast_dtype: torch.dtype | None,
    meter: Meter,
) -> Tensor:
    """Moves `state` on by a step. Nothing is read from the device, unless a term's targets are looked up on the host.

    Args:
        state: what changes.
        batch: of a size that is a multiple of ``accumulate``.
        transport: computes the flow's own loss.
        learning_rate: of this step.
        autocast_dtype: None for fp32.
        meter: is given the losses, the terms' metrics and the norm of the gradient.

    Returns:
        the sum of the losses of all passes, a detached 0-d tensor.
    """
    optim, step = state.config, state.steps_done
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    terms = [term for term in state.terms if term.active(step)]
    capture = _captures(terms, state.model.kernels)
    targets = [term.targets(batch, optim.accumulate) for term in terms]
    device = batch.samples.device
    step_loss = torch.zeros((), device=device)
    for part in batch.split(len(batch) // optim.accumulate):
        inputs: dict[str, Any] = part.condition.keywords()
        if capture:
            inputs["capture"] = capture
        with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
            output = transport.training_losses(state.model, part.samples, inputs, generator=state.generator)
            total = flow = output["loss"].mean()
            meter.add("loss", flow)
            for term, target in zip(terms, targets, strict=True):
                loss = term.loss(output.get("states", {}), next(target), step)
                total = total + loss
                meter.add(f"{term.name}_loss", loss)
                for name, value in term.metrics().items():
                    meter.add(name, value)
        state.scaler.scale(total / optim.accumulate).backward()
        step_loss = step_loss + total.detach()
    if optim.clip_norm is not None:
        state.scaler.unscale_(state.optimizer)
        meter.add("grad_norm", torch.nn.utils.clip_grad_norm_(state.trained, optim.clip_norm))
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.move_average()
    state.steps_done += 1
    state.samples_seen += len(batch.samples)
    return step_loss


def _captures(terms: list[LossTerm], kernels: str) -> list[Capture]:
    """What all of them need, once."""
    return list(dict.fromkeys(block for term in terms for block in term.captures(kernels)))
