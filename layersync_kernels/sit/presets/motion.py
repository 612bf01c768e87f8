"""Motion."""

from __future__ import annotations

import dataclasses

from ..config.data import DataConfig
from ..config.loss import LayerSyncConfig
from ..config.model import ModelConfig
from ..config.motion import MotionConfig
from ..config.optim import OptimConfig
from ..config.run import LogConfig, TrainConfig
from ..config.sampling import SamplingConfig
from .small import OPTIM, SAMPLING

PRESETS: dict[str, TrainConfig] = {
    # Two CPU cores learn six actions of CMU's recordings. A frame is a token: its 70 values and as many of noise have
    # to pass through a token, and with patches of 4 frames (280 values) a width of 192 is too little.
    "motion": TrainConfig(
        data=DataConfig(
            data="cmu-mocap",
            split="train",
            motion=MotionConfig(motion_frames=36, motion_stride=4, motion_fps=15.0),
        ),
        model=ModelConfig(model="SiT-P/2", patch_size=1, hidden_size=128, depth=6, num_heads=4),
        optim=dataclasses.replace(OPTIM, lr=3e-3, ema_decay=0.998),
        sampling=SAMPLING,
        log=LogConfig(log_every=50, sample_every=2000, checkpoint_every=2000, grid_columns=4),
        precision="fp32",
    ),
    # HumanML3D, 263 features of up to 196 frames at 20 a second, told in words: for a card. The paper's model there is
    # MDM (512 wide, 8 blocks), whose guide is docs/integrations/motion-diffusion-model.md; this is a SiT of its size.
    "motion-humanml3d": TrainConfig(
        data=DataConfig(
            data="HumanML3D",
            split="train",
            text_encoder="transformers/openai/clip-vit-base-patch32",
            memory_limit_gb=64.0,  # each of 70,000 captions is a sample: 15 GB of motion, up to 11 GB of words
            motion=MotionConfig(motion_frames=196, motion_stride=196, motion_fps=None),
        ),
        model=ModelConfig(model="SiT-B/2", patch_size=1, hidden_size=512, depth=8, num_heads=8, condition="cross"),
        layersync=LayerSyncConfig(layersync=("3:6",)),
        optim=OptimConfig(batch_size=64, steps=600_000),
        sampling=SamplingConfig(cfg_scale=2.5),
        log=LogConfig(sample_every=50_000, checkpoint_every=50_000, grid_columns=4),
    ),
}
