"""What the presets for two CPU cores and minutes have in common."""

from __future__ import annotations

from ..config.optim import OptimConfig
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
