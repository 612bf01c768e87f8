"""One optimiser step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import WHOLE, Batch, Share
from ..diffusion.transport import Transport
from ..distributed.parallel import gradients_kept
from ..distributed.shards import whole
from .phases import phase
from .runlog import Meter
from .state import TrainState


def train_step(
    state: TrainState,
    batch: Batch,
    transport: Transport,
    *,
    learning_rate: float,
    autocast_dtype: torch.dtype | None,
    meter: Meter,
    share: Share = WHOLE,
) -> Tensor:
    """Moves `state` on by a step. Nothing is read from the device, unless a term's targets are looked up on the host.

    Args:
        state: what changes.
        batch: of a size that is a multiple of ``accumulate``.
        transport: computes the flow's own loss.
        learning_rate: of this step.
        autocast_dtype: None for fp32.
        meter: is given the losses, the terms' metrics and the norm of the gradient.
        share: what `batch` is of that of all processes.

    Returns:
        the sum of the losses of all passes, a detached 0-d tensor.
    """
    optim, step = state.config, state.steps_done
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    with phase("forward"):
        terms = [term for term in state.terms if term.active(step)]
        targets = [term.targets(batch, optim.accumulate) for term in terms]
    step_loss = torch.zeros((), device=batch.samples.device)
    parts = batch.split(len(batch) // optim.accumulate)
    for number, part in enumerate(parts, 1):
        with gradients_kept(state.network, state.divided, last=number == len(parts)):
            with phase("forward"):
                found = state.network(
                    part,
                    terms,
                    [next(target) for target in targets],
                    transport=transport,
                    step=step,
                    generator=state.generator,
                    autocast_dtype=autocast_dtype,
                    share=share.of_a_pass,
                )
            total = found.pop("total")
            with phase("backward"):
                state.scaler.scale(total / optim.accumulate).backward()
        with phase("log"):
            step_loss = step_loss + total.detach()
            for name, value in found.items():
                meter.add(name, value)
    with phase("optimizer"):
        if optim.clip_norm is not None:
            state.scaler.unscale_(state.optimizer)
            meter.add("grad_norm", whole(torch.nn.utils.clip_grad_norm_(state.trained, optim.clip_norm)))
        state.saver.copied()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
    with phase("ema"):
        state.move_average()
    state.steps_done += 1
    state.samples_seen += len(batch) * share.world
    return step_loss
