"""Judges what a run on CMU's motions draws: are asked actions recognised, and do walks walk?

python benchmarks/action_probe.py RUN --data-root DIR [--samples 20] [--walks 50] [--out FOLDER]

The classifier is that of `layersync evaluate`, on windows that lie closer; here its accuracy is that of each action.
Walks are judged by steps a second, by speed, and by how fast the slower foot slides, each against real walks.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layersync_kernels.runtime.cache import cache_folder
from layersync_kernels.sit.batch import Condition
from layersync_kernels.sit.config.io import load_config
from layersync_kernels.sit.config.run import CONFIG
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.data.motion_cmu import ACTIONS
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.diffusion.transport import build_transport
from layersync_kernels.sit.evaluation.motion_classifier import MotionNetwork
from layersync_kernels.sit.modality.base import Modality
from layersync_kernels.sit.modality.motion import Motion
from layersync_kernels.sit.sampling.draw import conditions, draw
from layersync_kernels.sit.sampling.load import load_trained

FEET = (4, 10)
"""The ankles of CMU's skeleton."""


def accuracy(network: MotionNetwork, modality: Modality, samples: Tensor, condition: Condition) -> dict[str, Any]:
    """Of all, the mean over classes, and that of each class."""
    logits = network(modality.arrays(samples, condition.lengths), "motion").logits
    assert logits is not None
    right = logits.argmax(1) == condition.labels
    of_class = {
        name: round(right[condition.labels == label].float().mean().item(), 3)
        for label, name in enumerate(ACTIONS)
        if (condition.labels == label).any()
    }
    return {
        "count": len(right),
        "accuracy": round(right.float().mean().item(), 3),
        "mean_over_classes": round(float(np.mean(list(of_class.values()))), 3),
        "of_class": of_class,
    }


def gait(clips: list[np.ndarray], fps: float) -> np.ndarray:
    """(N, 3): steps a second, and speeds in m/s of the body and of the slower foot, of joints (T, 38, 3)."""
    found = []
    for clip in clips:
        feet = clip[:, FEET][..., [0, 2]]
        apart = np.linalg.norm(feet[:, 0] - feet[:, 1], axis=-1)
        spectrum = np.abs(np.fft.rfft((apart - apart.mean()) * np.hanning(len(apart)), 1024))
        rates = np.fft.rfftfreq(1024, 1 / fps)
        speed = np.linalg.norm(np.diff(clip[:, 0][:, [0, 2]], axis=0), axis=-1).mean() * fps
        slower = np.linalg.norm(np.diff(feet, axis=0), axis=-1).min(1).mean() * fps
        found.append([rates[(spectrum * (rates > 0.6)).argmax()], speed, slower])
    return np.array(found)


def summary(values: np.ndarray) -> dict[str, list[float]]:
    """5th, 50th and 95th percentile of each column of `gait`."""
    names = ("steps_per_second", "body_speed", "slower_foot_speed")
    return {n: np.percentile(v, [5, 50, 95]).round(2).tolist() for n, v in zip(names, values.T, strict=True)}


def main() -> None:
    """Prints JSON; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--samples", type=int, default=20, help="of each action, for the classifier")
    parser.add_argument("--walks", type=int, default=50)
    parser.add_argument("--out", type=Path, default=None, help="folder for pictures of the walks, and a row per action")
    arguments = parser.parse_args()
    config = load_config(arguments.run / CONFIG)
    motion = dataclasses.replace(config.data.motion, motion_stride=4)
    source = dataclasses.replace(
        config.data, data_root=arguments.data_root or config.data.data_root, split="all", motion=motion
    )
    data = load_data(source)
    assert isinstance(data, MemorySet)
    assert data.test is not None
    trained = load_trained(arguments.run)
    modality = trained.modality
    assert isinstance(modality, Motion)
    assert isinstance(data.modality, Motion)
    train, test = data.subset((~data.test).nonzero().flatten()), data.subset(data.test.nonzero().flatten())
    network = MotionNetwork(train, test, cache_folder() / "evaluate")
    labels = torch.arange(len(ACTIONS)).repeat_interleave(arguments.samples)
    labels = torch.cat([labels, torch.zeros(max(0, arguments.walks - arguments.samples), dtype=torch.long)])
    condition = conditions(labels, trained.lengths)
    samples = draw(trained.model, build_transport(config.transport), config.sampling, condition, seed=1)
    walks = (labels == 0).nonzero().flatten()[: arguments.walks]
    assert condition.lengths is not None
    drawn = modality.skeletons(samples[walks], condition.lengths[walks])
    full = (train.labels == 0) & (train.lengths == data.spec.extent[0])
    real = gait(data.modality.skeletons(train.samples[full]), modality.fps)
    figures = gait(drawn, modality.fps)
    low, high = np.percentile(real, [1, 99], axis=0)
    inside = (figures >= low * 0.9) & (figures <= high * 1.1)
    report = {
        "real_train": accuracy(network, data.modality, train.samples, train.take(torch.arange(len(train))).condition),
        "real_test": accuracy(network, data.modality, test.samples, test.take(torch.arange(len(test))).condition),
        "samples": accuracy(network, modality, samples, condition),
        "real_walks": summary(real),
        "drawn_walks": summary(figures),
        "walks_within_the_real_range": {
            "all_three": int(inside.all(1).sum()),
            **dict(zip(("steps", "body_speed", "slower_foot_speed"), inside.sum(0).tolist(), strict=True)),
            "of": len(walks),
        },
    }
    print(json.dumps(report, indent=2))
    if arguments.out:
        modality.overview(samples[walks], arguments.out / "walks", columns=5, lengths=condition.lengths[walks])
        rows = torch.cat([(labels == label).nonzero().flatten()[:4] for label in range(len(ACTIONS))])
        modality.overview(samples[rows], arguments.out / "actions", columns=4, lengths=condition.lengths[rows])


if __name__ == "__main__":
    main()
