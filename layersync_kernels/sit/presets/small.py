"""What the presets for two CPU cores and minutes have in common, and what is trained where no preset is named."""

from __future__ import annotations

import dataclasses

from ..config.model import ModelConfig
from ..config.optim import OptimConfig
from ..config.run import LogConfig, TrainConfig
from ..config.sampling import SamplingConfig

OPTIM = OptimConfig(
    steps=100_000,  # more than the time allows
    max_seconds=480.0,
    batch_size=16,
    lr_schedule="cosine",
    warmup_steps=100,
    betas=(0.9, 0.99),
    clip_norm=1.0,
    ema_warmup=True,
)
"""On this budget steps count: small batches and a high rate."""
SAMPLING = SamplingConfig(solver="heun", sampling_steps=25, cfg_scale=2.0)
"""25 steps of two evaluations each."""

PRESETS = {
    # Whatever data there are. A long run names a preset for cards, or --steps and the rest.
    "small": TrainConfig(
        model=ModelConfig(model="SiT-P/2"),
        optim=dataclasses.replace(OPTIM, steps=20_000, lr=3e-3, ema_decay=0.998),
        sampling=SAMPLING,
        log=LogConfig(log_every=50, sample_every=1500, checkpoint_every=1500),
    ),
    # The paper's optimiser for whatever data and model there are: 400,000 steps. images-imagenet-256 is its setting.
    "paper": TrainConfig(),
}
