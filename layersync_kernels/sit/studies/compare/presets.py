"""Studies by name: `layersync compare --study NAME`. What was found with them is in docs/results."""

from __future__ import annotations

import dataclasses

from ...config.data import DataConfig
from ...config.loss import LayerSyncConfig
from ...config.model import ModelConfig
from ...config.optim import OptimConfig
from ...config.run import LogConfig, TrainConfig
from ...config.sampling import SamplingConfig
from ...presets.registry import PRESETS
from ...presets.small import OPTIM
from .config import CompareConfig

PAPER = "paper=layersync --layersync 2:5 --weight 0.2"
"""The pair of the paper, 8:16 of 28 blocks, in a model of 8."""
ARMS = (
    "vanilla",
    "near=layersync --layersync 1:6 --weight 0.2",
    "near-strong=layersync --layersync 1:6 --weight 1",
    "far=layersync --layersync 1:7 --weight 0.2",
    "far-strong=layersync --layersync 1:7 --weight 1",
    PAPER,
)
"""Of a model of 8 blocks, where neighbouring blocks are alike: two pairs whose cosine leaves something to do, with two
weights each, and the paper's."""
_SAMPLING = SamplingConfig(solver="euler", sampling_steps=16)
_LOG = LogConfig(sample_every=0, checkpoint_every=10_000, tensorboard=False)


def _small(train: TrainConfig, steps: int, **changes: object) -> CompareConfig:
    """A study that takes two cores an hour or two: 24 runs of a model of 8 blocks, 192 wide."""
    model = dataclasses.replace(train.model, hidden_size=192, depth=8, num_heads=6)
    optim = dataclasses.replace(train.optim, steps=steps, max_seconds=None, lr=2e-3)
    train = dataclasses.replace(
        train, model=model, optim=optim, sampling=_SAMPLING, log=_LOG, precision="bf16", threads=1
    )
    common = CompareConfig(
        train=train, methods=ARMS, seeds=4, marks=6, frechet_every=2, samples=500, held_out=500, validation_split=True
    )
    return dataclasses.replace(common, **changes)  # type: ignore[arg-type]


_IMAGES = TrainConfig(
    data=DataConfig(data="cifar10", split="train", flip=True),
    model=ModelConfig(model="SiT-P/2", patch_size=4),
    optim=dataclasses.replace(OPTIM, ema_decay=0.998),
)
_CARD = TrainConfig(
    data=DataConfig(data="cifar10", split="train", flip=True),
    model=ModelConfig(model="SiT-B/2"),
    layersync=LayerSyncConfig(layersync=("4:8",), weight=(0.3,)),
    optim=OptimConfig(steps=50_000, warmup_steps=1000, lr=2e-4, batch_size=256, ema_decay=0.9999),
    sampling=SamplingConfig(solver="heun", sampling_steps=50),
    log=LogConfig(sample_every=0, checkpoint_every=10_000),
)
_CARD_ARMS = (
    "vanilla",
    "near=layersync --layersync 4:8 --weight 0.3",
    "near-strong=layersync --layersync 4:8 --weight 1",
    "far=layersync --layersync 1:9 --weight 0.3",
    "far-strong=layersync --layersync 1:9 --weight 1",
    "paper=layersync --layersync 3:7 --weight 0.3",  # 8:16 of 28 in 12
)
_CARD_STUDY = CompareConfig(
    train=_CARD,
    methods=_CARD_ARMS,
    seeds=3,
    marks=10,
    samples=10_000,
    reference=50_000,
    frechet_every=2,
    validation_split=True,
    pilot=0.05,
)

STUDIES: dict[str, CompareConfig] = {
    "images": _small(_IMAGES, 1200),
    "motion": _small(PRESETS["motion"], 2000),
    "audio": _small(PRESETS["audio"], 2000),
    "video": _small(PRESETS["video"], 1000),
    # For a card: SiT-B/2, 50,000 steps. Latents are those that `layersync latents --flip` has written.
    "images-cifar10": _CARD_STUDY,
    "images-latents": dataclasses.replace(
        _CARD_STUDY,
        train=dataclasses.replace(_CARD, data=DataConfig(data="imagenet-latents", split="train", flip=True)),
    ),
}
