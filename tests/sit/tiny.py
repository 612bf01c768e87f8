"""A run that trains in milliseconds."""

from __future__ import annotations

import dataclasses

import torch

from layersync_kernels.sit.checkpoints.local import list_checkpoints, read_tensors, stems, tensors_path
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.config.model import ModelConfig
from layersync_kernels.sit.config.optim import OptimConfig
from layersync_kernels.sit.config.run import LogConfig, TrainConfig
from layersync_kernels.sit.config.sampling import SamplingConfig
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.spec import SampleSpec


def tiny_config(**groups):
    """Trains in milliseconds: 16 samples of 4x4, three blocks of width 16."""
    config = TrainConfig(
        data=DataConfig(data="unused", flip=True),
        model=ModelConfig(model="SiT-P/2", hidden_size=16, depth=3, num_heads=2, class_dropout=0.3),
        optim=OptimConfig(steps=12, batch_size=5, lr=1e-2, ema_decay=0.9, clip_norm=1.0, warmup_steps=4, accumulate=1),
        sampling=SamplingConfig(solver="euler", sampling_steps=3, cfg_scale=2.0),
        log=LogConfig(log_every=2, sample_every=4, checkpoint_every=4, tensorboard=False, grid_columns=2, keep=10),
        device="cpu",
        precision="fp32",
    )
    for name, changes in groups.items():
        value = dataclasses.replace(getattr(config, name), **changes) if isinstance(changes, dict) else changes
        config = dataclasses.replace(config, **{name: value})
    return config


def tiny_data():
    generator = torch.Generator().manual_seed(0)
    return MemorySet(
        spec=SampleSpec(1, (4, 4)),
        num_classes=3,
        class_names=["a", "b", "c"],
        samples=torch.randint(0, 256, (16, 1, 4, 4), generator=generator, dtype=torch.uint8),
        labels=torch.arange(16) % 3,
    )


def saved(run_dir):
    """The tensors of the newest checkpoint of a run, by stem and name."""
    checkpoint = list_checkpoints(run_dir)[-1]
    return {stem: read_tensors(tensors_path(checkpoint, stem)) for stem in stems(checkpoint)}


def equal(first, second):
    """Whether named tensors are the same, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def run_state(step, num_classes=3):
    """What the trainer's state.json holds at that step, of 4x4 samples."""
    data = {"shape": [1, 4, 4], "num_classes": num_classes, "class_names": ["a", "b", "c"], "latent": False}
    return {"run": "tiny", "samples_seen": 5 * step, "seconds": 0.5 * step, "scaler": {}, "data": data}
