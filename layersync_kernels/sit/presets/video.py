"""Video."""

from __future__ import annotations

import dataclasses

from ..config.data import DataConfig
from ..config.loss import LayerSyncConfig
from ..config.model import ModelConfig
from ..config.optim import OptimConfig
from ..config.run import LogConfig, TrainConfig
from ..config.sampling import SamplingConfig
from ..config.video import VideoConfig
from .small import OPTIM, SAMPLING

PRESETS: dict[str, TrainConfig] = {
    # Digits that move sideways: a frame of 14x20 has no other room. Patches of all frames and 2x2 pixels: those of 4
    # frames show a seam in time, and where digits move up and down too (20x20) none was legible after 2,000 steps.
    # Guidance by 2, 3 and 5 after 3,184 steps: 9, 16 and 18 of 50 are recognised in first, middle and last frame.
    "video": TrainConfig(
        data=DataConfig(
            data="moving-mnist", split="train", video=VideoConfig(frames=8, video_size=(14, 20), made_clips=20_000)
        ),
        model=ModelConfig(model="SiT-P/2", patch_size=(8, 2, 2), hidden_size=96, depth=6, num_heads=3),
        layersync=LayerSyncConfig(layersync=("2:4",)),
        optim=dataclasses.replace(OPTIM, lr=4e-3, ema_decay=0.997),
        sampling=dataclasses.replace(SAMPLING, cfg_scale=4.0),
        log=LogConfig(log_every=50, sample_every=1500, checkpoint_every=1500),
        precision="fp32",
    ),
    # Bodies that collide, in colour, for twenty minutes. Patches of all frames and 2x2 pixels, 96 values in tokens of
    # 192 channels: with 192 values (24x24 pixels in patches of 4x4x4) all was noise after 7,668 steps.
    "video-bodies": TrainConfig(
        data=DataConfig(
            data="bodies", split="train", video=VideoConfig(frames=8, video_size=(16, 16), made_clips=5000), channels=3
        ),
        model=ModelConfig(model="SiT-P/2", patch_size=(8, 2, 2), hidden_size=192, depth=6, num_heads=6),
        layersync=LayerSyncConfig(layersync=("2:4",)),
        optim=dataclasses.replace(OPTIM, max_seconds=1200.0, lr=2e-3, ema_decay=0.997),
        sampling=dataclasses.replace(SAMPLING, cfg_scale=1.5),
        log=LogConfig(log_every=50, sample_every=2000, checkpoint_every=2000),
        precision="fp32",
    ),
    # A card trains on CLEVRER as in the paper: SiT-XL from scratch. Size, length and rate of the clips, and that they
    # are pixels, are ours. The folder holds its .mp4 files, or the sub-folders in which they come.
    "video-clevrer": TrainConfig(
        data=DataConfig(
            data="data/clevrer",
            channels=3,
            video=VideoConfig(frames=16, video_fps=12.5, video_size=(64, 96)),
            workers=12,
        ),
        model=ModelConfig(model="SiT-XL/2", patch_size=(2, 8, 8), condition="none", class_dropout=0.0),
        layersync=LayerSyncConfig(layersync=("8:16",)),
        optim=OptimConfig(steps=400_000, batch_size=64, lr=1e-4),
        sampling=SamplingConfig(sampler="sde", solver="euler", sampling_steps=250),
        log=LogConfig(grid_classes=1, grid_columns=16),
    ),
}
