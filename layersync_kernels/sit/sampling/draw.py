"""Drawing samples."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError
from ..config.sampling import SamplingConfig
from ..diffusion.sampler import Sampler
from ..diffusion.transport import Transport
from ..models.sit import SiT


def draw(
    model: SiT,
    transport: Transport,
    sampling: SamplingConfig,
    labels: Tensor,
    *,
    seed: int,
    autocast_dtype: torch.dtype | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Draws one sample per label; a seed gives the same noise on every device, and leaves the global generators alone.

    Args:
        model: in evaluation mode.
        transport: the one that the model was trained with.
        sampling: solver and guidance.
        labels: int64 (N,), on the model's device.
        seed: of the noise.
        autocast_dtype: None for fp32.
        batch_size: samples drawn at once.

    Returns:
        float32 (N, C, H, W).

    Raises:
        ConfigError: sampler settings that do not exist, or guidance from a model without a null label.
    """
    guided = sampling.cfg_scale != 1.0
    if guided and model.y_embedder.dropout_prob == 0:
        raise ConfigError("--cfg-scale needs a model that was trained with --class-dropout above 0")
    # Another seed than that of the starting noise, or the first step of an SDE would add the same noise again.
    generator = torch.Generator(labels.device).manual_seed(seed + 2**31)  # a CPU generator takes 32 bits
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
    noise = torch.randn(len(labels), *model.spec.shape, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    interval = None if sampling.guidance_interval == (0.0, 1.0) else sampling.guidance_interval
    drawn = []
    with torch.autocast(labels.device.type, autocast_dtype, enabled=autocast_dtype is not None):
        for z, y in zip(noise.split(batch_size), labels.split(batch_size), strict=True):
            if guided:
                both = solve(
                    torch.cat([z, z]),
                    model.forward_with_cfg,
                    y=torch.cat([y, torch.full_like(y, model.num_classes)]),
                    cfg_scale=sampling.cfg_scale,
                    guidance_interval=interval,
                )
                drawn.append(both[: len(z)])
            else:
                drawn.append(solve(z, model, y=y))
    return torch.cat(drawn).float()
