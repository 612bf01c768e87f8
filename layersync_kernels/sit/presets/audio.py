"""Audio."""

from __future__ import annotations

import dataclasses

from ..config.audio import AudioConfig
from ..config.data import DataConfig
from ..config.loss import LayerSyncConfig
from ..config.model import ModelConfig
from ..config.run import LogConfig, TrainConfig
from .small import OPTIM, SAMPLING

PRESETS: dict[str, TrainConfig] = {
    # Two CPU cores learn to speak digits, of six speakers. A token is a frame of 16 ms: 80 bands, of which patches of
    # several frames would leave a narrow model too little room.
    "audio": TrainConfig(
        data=DataConfig(data="fsdd", split="train", audio=AudioConfig(clip_seconds=0.64)),
        model=ModelConfig(model="SiT-P/2", patch_size=1, hidden_size=128, depth=6, num_heads=4),
        optim=dataclasses.replace(OPTIM, lr=3e-3, ema_decay=0.998),
        sampling=SAMPLING,
        log=LogConfig(log_every=50, sample_every=2000, checkpoint_every=2000, grid_columns=5),
        precision="fp32",
    ),
    # As in the paper: latents of an audio autoencoder, MTG-Jamendo. Write the latents with `layersync latents` first.
    "audio-jamendo": TrainConfig(
        data=DataConfig(data="jamendo-latents"),
        model=ModelConfig(model="SiT-XL/2", patch_size=1),
        layersync=LayerSyncConfig(layersync=("8:16",)),
        log=LogConfig(sample_every=50_000, checkpoint_every=50_000),
    ),
}
