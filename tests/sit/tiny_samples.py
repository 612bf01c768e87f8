"""Small samples of each kind, and a network that looks at images in no time."""

import numpy as np
import pytest
import torch
from torch import nn

from layersync_kernels.sit.teachers.base import Teacher


class Tiny(nn.Module):
    """With the modules of EfficientNet-Lite0 that are looked for: 8x8 pixels to 2x2 places of 8, then 6 channels."""

    def __init__(self):
        super().__init__()
        self._blocks = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), *[nn.Identity()] * 9, nn.ReLU())
        self.last = nn.Conv2d(8, 6, 1)
        self._fc = nn.Linear(6, 4)
        generator = torch.Generator().manual_seed(1)
        for own in self.parameters():
            own.data.normal_(0, 0.4, generator=generator)

    def forward(self, images):
        return self.last(self._blocks(images)).relu()


def tiny_network(name, *, size=None, weights=None, last=True):
    assert last
    network = Tiny()
    return Teacher(name, network, network, size or 8)


def images(count, seed=0):
    """Stripes of two directions, uint8 (N, 8, 8, 1), and which."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    wave = 90 * np.sin(np.arange(8) * 1.6 + generator.uniform(0, 6, (count, 1)))[:, None, :] + 128
    stripes = np.where(labels[:, None, None] == 1, wave, wave.transpose(0, 2, 1)) + generator.normal(
        0, 8, (count, 8, 8)
    )
    return stripes.clip(0, 255).astype(np.uint8)[..., None], labels


def films(count, generator):
    """Bars that move to the right, uint8 (N, 4, 8, 8, 1)."""
    start = generator.integers(0, 6, (count, 1, 1, 1))
    place = (start + np.arange(4)[:, None, None]) % 8
    moving = np.where(np.arange(8) == place, 255, 20) + np.zeros((count, 4, 8, 8), int)
    return (moving - generator.integers(0, 15, moving.shape)).astype(np.uint8)[..., None]


def bodies(path, count=80):
    """Recordings of five joints that swing slowly or fast."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 2
    time = np.arange(16) / 16
    swing = np.sin(2 * np.pi * np.where(labels == 1, 3, 1)[:, None] * time + generator.uniform(0, 6, (count, 1)))
    rest = np.array([[0, 1, 0], [0.2, 0.9, 0], [-0.2, 0.9, 0], [0, 1.5, 0.1], [0, 0.1, 0.2]])
    places = np.broadcast_to(rest, (count, 16, 5, 3)) + generator.normal(0, 0.01, (count, 16, 5, 3))
    places[..., 3, 2] += 0.4 * swing
    places[..., 2] += time[:, None]
    np.savez(path, positions=places.astype(np.float32), labels=labels, parents=np.array([-1, 0, 0, 0, 0]), fps=16.0)


def tones(folder, count):
    """So many low and so many high sounds of 8 kHz and several lengths, in folders of these names."""
    soundfile = pytest.importorskip("soundfile")
    generator = np.random.default_rng(0)
    for name, hertz in (("low", 300), ("high", 1500)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            time = np.arange(1200 + 60 * (i % 5)) / 8000
            sound = 0.3 * np.sin(2 * np.pi * hertz * generator.uniform(0.8, 1.2) * time + generator.uniform(0, 6))
            soundfile.write(folder / name / f"{i}.wav", sound + generator.normal(0, 0.01, len(time)), 8000)
