"""Video."""

from __future__ import annotations

from ..config.data import DataConfig
from ..config.loss import LayerSyncConfig
from ..config.model import ModelConfig
from ..config.optim import OptimConfig
from ..config.run import LogConfig, TrainConfig
from ..config.sampling import SamplingConfig
from ..config.video import VideoConfig

PRESETS: dict[str, TrainConfig] = {
    "video": TrainConfig(
        data=DataConfig(
            data="moving-mnist", split="train", video=VideoConfig(frames=8, video_size=(20, 20), made_clips=20_000)
        ),
        model=ModelConfig(model="SiT-P/2", patch_size=(2, 4, 4), hidden_size=96, depth=6, num_heads=3),
        layersync=LayerSyncConfig(layersync=("2:4",)),
        optim=OptimConfig(
            steps=100_000,
            max_seconds=480.0,
            batch_size=16,
            lr=3e-3,
            lr_schedule="cosine",
            warmup_steps=100,
            betas=(0.9, 0.99),
            clip_norm=1.0,
            ema_decay=0.997,
            ema_warmup=True,
        ),
        sampling=SamplingConfig(solver="heun", sampling_steps=25, cfg_scale=2.0),
        log=LogConfig(log_every=50, sample_every=2000, checkpoint_every=2000),
        precision="fp32",
    ),
}
