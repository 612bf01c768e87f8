"""Drawing samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ..batch import Condition, within_lengths
from ..config.sampling import SamplingConfig
from ..diffusion.sampler import Sampler
from ..diffusion.transport import Transport
from ..models.sit import SiT


def conditions(
    labels: Tensor,
    lengths: Sequence[Sequence[int]] = (),
    text: Tensor | None = None,
    text_lengths: Tensor | None = None,
    which: Tensor | None = None,
) -> Condition:
    """Conditions of samples to draw.

    Args:
        labels: int64 (N,).
        lengths: typical ones of each class, which the samples of a class take in turn; empty: all are full.
        text: (M, L, E), words of texts.
        text_lengths: int64 (M,), how many of the L there are.
        which: int64 (N,), the text of each sample.
    """
    if text is not None and text_lengths is not None and which is not None:
        text, text_lengths = text[which], text_lengths[which]
    if not lengths:
        return Condition(labels, text=text, text_lengths=text_lengths)
    turn: dict[int, int] = {}
    chosen = []
    for label in labels.tolist():
        own = lengths[label] or (max(map(max, filter(None, lengths))),)
        number = turn[label] = turn.get(label, -1) + 1
        chosen.append(own[number % len(own)])
    own_lengths = torch.tensor(chosen, device=labels.device)
    return Condition(labels, own_lengths, text, text_lengths)


def draw(
    model: SiT,
    transport: Transport,
    sampling: SamplingConfig,
    condition: Condition,
    *,
    seed: int,
    autocast_dtype: torch.dtype | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Draws one sample per label and length.

    A seed gives the same noise on every device, and leaves the global generators alone.

    Args:
        model: in evaluation mode.
        transport: the one that the model was trained with.
        sampling: solver and guidance.
        condition: of N samples, on the model's device.
        seed: of the noise.
        autocast_dtype: None for fp32.
        batch_size: samples drawn at once.

    Returns:
        float32 (N, C, ...), zeros beyond lengths.

    Raises:
        ConfigError: sampler settings that do not exist, or guidance from a model without a null label.
    """
    guided = sampling.cfg_scale != 1.0
    if guided and not model.guidable:
        raise ConfigError("--cfg-scale needs a model that was trained with --class-dropout above 0")
    # Another seed than that of the starting noise, or the first step of an SDE would add the same noise again.
    device = condition.labels.device
    generator = torch.Generator(device).manual_seed(seed + 2**31)  # a CPU generator takes 32 bits
    sampler = Sampler(transport)
    try:
        if sampling.sampler == "ode":
            solve = sampler.sample_ode(sampling_method=sampling.solver, num_steps=sampling.sampling_steps)
        else:
            solve = sampler.sample_sde(
                sampling_method=sampling.solver,
                num_steps=sampling.sampling_steps,
                diffusion_form=sampling.diffusion_form,
                diffusion_norm=sampling.diffusion_norm,
                generator=generator,
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    noise = torch.randn(len(condition), *model.spec.shape, generator=torch.Generator().manual_seed(seed)).to(device)
    inside = None
    if condition.lengths is not None:
        inside = within_lengths(condition.lengths, noise)
        noise = torch.where(inside, noise, 0)
    interval = None if sampling.guidance_interval == (0.0, 1.0) else sampling.guidance_interval
    drawn = []
    with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
        for z, part in zip(noise.split(batch_size), condition.split(batch_size), strict=True):
            if guided:
                both = solve(
                    torch.cat([z, z]),
                    model.forward_with_cfg,
                    **Condition.cat([part, model.without(part)]).keywords(),
                    cfg_scale=sampling.cfg_scale,
                    guidance_interval=interval,
                )
                drawn.append(both[: len(z)])
            else:
                drawn.append(solve(z, model, **part.keywords()))
    samples = torch.cat(drawn).float()
    return samples if inside is None else torch.where(inside, samples, 0)  # an SDE adds noise everywhere
