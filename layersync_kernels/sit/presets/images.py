"""Images."""

from __future__ import annotations

import dataclasses

from ..config.data import DataConfig
from ..config.loss import LayerSyncConfig
from ..config.model import ModelConfig
from ..config.optim import OptimConfig
from ..config.run import LogConfig, TrainConfig
from ..config.sampling import SamplingConfig
from .small import OPTIM, SAMPLING

PRESETS = {
    # Two CPU cores learn to draw recognisable digits in five minutes. On this budget steps count: a small model, small
    # batches and a high rate. Velocity loss on fixed noise and times after 150 CPU seconds: width 96 0.300; width 128
    # 0.317, with batches of 32 0.333, and at half the rate too 0.354. Depth 4 gets lower still (0.287), yet depth 6
    # draws better.
    "images": TrainConfig(
        data=DataConfig(data="mnist", image_size=14),
        model=ModelConfig(model="SiT-P/2", hidden_size=96, num_heads=3),
        optim=dataclasses.replace(OPTIM, steps=20_000, max_seconds=300.0, lr=4e-3, ema_decay=0.995),
        sampling=SAMPLING,
        log=LogConfig(log_every=50, sample_every=1500, checkpoint_every=1500),
        precision="fp32",  # bf16 is no faster at this width
    ),
    # Photographs of 32x32 on a card, as pixels.
    "images-cifar10": TrainConfig(
        data=DataConfig(data="cifar10", split="train", flip=True),
        model=ModelConfig(model="SiT-B/2"),
        layersync=LayerSyncConfig(layersync=("4:8",), weight=(0.3,)),
        optim=OptimConfig(steps=200_000, warmup_steps=1000, lr=2e-4, batch_size=256),
        log=LogConfig(sample_every=10_000, checkpoint_every=10_000),
    ),
    # The setting of the paper for a card: latents of Stable Diffusion, which `layersync latents --flip` writes.
    "images-imagenet-256": TrainConfig(
        data=DataConfig(data="imagenet-latents", flip=True),
        model=ModelConfig(model="SiT-XL/2"),
        layersync=LayerSyncConfig(layersync=("8:16",), weight=(0.2,)),
        optim=OptimConfig(steps=400_000, lr=1e-4, batch_size=256, weight_decay=0.0, ema_decay=0.9999),
        sampling=SamplingConfig(sampler="sde", solver="euler", sampling_steps=250),
        log=LogConfig(sample_every=50_000, checkpoint_every=50_000),
    ),
}
