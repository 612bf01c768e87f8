from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from layersync_kernels import cli
from layersync_kernels.errors import CheckpointError, ConfigError
from layersync_kernels.sit import compare as compare_module
from layersync_kernels.sit.checkpoint import list_checkpoints, read_tensors
from layersync_kernels.sit.compare import CompareCommand, CompareConfig, Comparison, compare, measure_memory
from layersync_kernels.sit.config import DataConfig, LogConfig, ModelConfig, OptimConfig, SamplingConfig, TrainConfig
from layersync_kernels.sit.quality import Gaussian, frechet_distance
from layersync_kernels.sit.report import first_at, summarise, value_at


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two methods, two seeds, six steps, on 60 samples of 4x4; the judging network looks at the pixels."""
    monkeypatch.setattr(compare_module, "load_network", lambda name, device: lambda images: images.flatten(1))
    monkeypatch.setattr(compare_module, "measure_memory", lambda config, run: 3_000_000)
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(60) % 3)
    train = TrainConfig(
        data=DataConfig(data=str(tmp_path / "data.npz"), flip=True),
        model=ModelConfig("SiT-P/2", hidden_size=16, depth=3, num_heads=2, class_dropout=0.3),
        optim=OptimConfig(steps=6, batch_size=4, lr=1e-2, ema_decay=0.5),
        sampling=SamplingConfig(solver="euler", sampling_steps=3),
        log=LogConfig(checkpoint_every=2),
        device="cpu",
        precision="fp32",
    )
    return CompareConfig(
        train=train,
        methods=("vanilla", "layersync"),
        seeds=2,
        marks=2,
        held_out=20,
        samples=20,
        reference=40,
        frechet_every=1,
    )


def qualities(out):
    runs = json.loads((out / "report.json").read_text())["runs"]
    keys = ("step", "validation_loss", "frechet")
    return {(run["method"], run["seed"]): [[mark[key] for key in keys] for mark in run["marks"]] for run in runs}


class StopAt:
    """A request to stop that comes when it is asked for the n-th time."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self):
        self.left -= 1
        return self.left < 0


def test_stopped_and_resumed_comparison_reports_the_same(config, tmp_path):
    compare(CompareCommand(config, tmp_path / "whole"))
    stopped = CompareCommand(config, tmp_path / "parts")
    compare_module.prepare(config, stopped.out)
    for calls in (3, 17, 12):  # between runs, and between two marks
        assert not Comparison(config, stopped.out).train(StopAt(calls))
    compare(stopped)
    assert qualities(tmp_path / "parts") == qualities(tmp_path / "whole")
