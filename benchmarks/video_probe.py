"""Whether the films of a run stay what they are and move as real ones do.

    python benchmarks/video_probe.py RUN [--samples 50] [--out FOLDER]

Of `moving-mnist`: a small convolutional network, trained on single frames of the training split, names the first,
middle and last frame of each film; the centre of brightness gives its speed. Of `bodies`: pixels are counted by the
colours of bodies, which gives the number of bodies in each frame. Real films of the test split are judged the same way.
Prints JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layersync_kernels.sit.config.io import load_config
from layersync_kernels.sit.config.run import CONFIG
from layersync_kernels.sit.data.base import SampleSet
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.data.video_bodies import CLASSES, COLOURS
from layersync_kernels.sit.diffusion.transport import build_transport
from layersync_kernels.sit.sampling.draw import conditions, draw
from layersync_kernels.sit.sampling.load import load_trained

MOST_PIXELS = 0.01
"""Of a frame that have a body's colour, at least, for it to be counted."""


def train_probe(data: SampleSet, steps: int = 600) -> nn.Module:
    """A classifier of single frames (B, 1, H, W)."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, data.num_classes),
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    batches = data.batches(64, seed=0)
    for _ in range(steps):
        batch = next(batches)
        frame = torch.randint(batch.samples.shape[2], (len(batch),))
        frames = batch.samples[torch.arange(len(batch)), :, frame]
        frames = frames + 0.1 * torch.rand(len(batch), 1, 1, 1) * torch.randn_like(frames)  # samples are never clean
        loss = F.cross_entropy(net(frames), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def recognised(net: nn.Module, films: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares of films (N, 1, T, H, W) whose frames are named as asked, and whose frames are all named alike."""
    named = torch.stack([net(frame).argmax(1) for frame in films.unbind(2)], 1)
    right = named == labels[:, None]
    last = named.shape[1] - 1
    return {
        "first_middle_last": float(right[:, [0, last // 2, last]].all(1).float().mean()),
        "all_frames": float(right.all(1).float().mean()),
        "a_frame": float(right.float().mean()),
        "one_name_throughout": float((named == named[:, :1]).all(1).float().mean()),
    }


def motion(films: Tensor) -> dict[str, Any]:
    """Of the centre of brightness, in pixels: speeds, and how much the velocity changes from frame to frame."""
    light = ((films[:, 0] + 1) / 2).clamp(0, 1)
    light = light * (light > 0.2)
    mass = light.sum((2, 3)).clamp_min(1e-6)
    y = (light.sum(3) * torch.arange(light.shape[2])).sum(2) / mass
    x = (light.sum(2) * torch.arange(light.shape[3])).sum(2) / mass
    velocity = torch.stack([y, x], -1).diff(dim=1)
    change = velocity.diff(dim=1).norm(dim=-1)
    return {
        "speed": _percentiles(velocity.norm(dim=-1)),
        "change_of_velocity": _percentiles(change),
        "change_of_brightness": _percentiles(mass.diff(dim=1).abs() / mass[:, 1:]),
    }


def _percentiles(values: Tensor) -> list[float]:
    """5th, 50th and 95th."""
    return [round(float(value), 3) for value in np.percentile(values.numpy(), [5, 50, 95])]


def bodies(films: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares of films (N, 3, T, H, W) with the asked number of colours in frames, and with the same ones in all."""
    wanted = torch.tensor([int(CLASSES[label].split()[0]) for label in labels.tolist()])
    pixels = ((films + 1) / 2).clamp(0, 1)
    hue = F.normalize(pixels - pixels.mean(1, keepdim=True), dim=1, eps=0.02)
    strong = (pixels.amax(1) - pixels.amin(1)) > 0.25
    colours = torch.tensor(COLOURS)
    colours = F.normalize(colours - colours.mean(1, keepdim=True), dim=1)
    nearest = torch.einsum("kc,ncthw->nkthw", colours, hue).argmax(1)
    counts = torch.stack([((nearest == k) & strong).flatten(2).float().mean(2) for k in range(len(COLOURS))], 2)
    seen = counts > MOST_PIXELS  # (N, T, colours)
    middle = slice(0, films.shape[2] - 1)  # towards the end bodies may leave the picture
    number = seen.sum(2)
    return {
        "asked_number_in_the_first_frame": float((number[:, 0] == wanted).float().mean()),
        "asked_number_in_all_but_the_last": float((number[:, middle] == wanted[:, None]).all(1).float().mean()),
        "no_new_colour_after_the_first_frame": float((seen[:, 1:] <= seen[:, :1]).flatten(1).all(1).float().mean()),
    }


def main() -> None:
    """Prints JSON; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--columns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="folder for a contact sheet and an animation")
    arguments = parser.parse_args()
    config = load_config(arguments.run / CONFIG)
    train, test = (load_data(dataclasses.replace(config.data, split=split)) for split in ("train", "test"))
    trained = load_trained(arguments.run)
    labels = torch.arange(arguments.samples) * trained.num_classes // arguments.samples
    films = draw(trained.model, build_transport(config.transport), config.sampling, conditions(labels), seed=1)
    real = test.take(torch.arange(min(len(test), 1000)))
    sets = {"real": (real.samples, real.labels), "samples": (films, labels)}
    if config.data.data == "bodies":
        report: dict[str, Any] = {name: bodies(*pair) for name, pair in sets.items()}
    else:
        net = train_probe(train)
        report = {name: {**recognised(net, *pair), **motion(pair[0])} for name, pair in sets.items()}
    print(json.dumps(report, indent=2))
    if arguments.out:
        trained.modality.overview(films, arguments.out / "samples", columns=arguments.columns)


if __name__ == "__main__":
    main()
