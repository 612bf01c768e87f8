"""What share of a run's spoken digits is heard as the digit that was asked for.

pip install --no-deps Resemblyzer==0.1.4
python benchmarks/speech_probe.py RUN --data-root DIR [--samples 20] [--out FOLDER]

The listener: states of Resemblyzer's speech network, averaged over eight equal parts of a sound, and a linear
classifier that is fitted to the training takes of the Free Spoken Digit Dataset. It is asked about test takes as they
are, about the same takes through the run's representation (of a spectrogram, Griffin-Lim's sound), the most that a run
can reach, and about samples.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layersync_kernels.sit.config.io import load_config
from layersync_kernels.sit.config.run import CONFIG
from layersync_kernels.sit.data.audio import FSDD
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.diffusion.transport import build_transport
from layersync_kernels.sit.evaluation.probes import linear_probe
from layersync_kernels.sit.modality.audio import Sound
from layersync_kernels.sit.sampling.draw import conditions, draw
from layersync_kernels.sit.sampling.load import load_trained
from layersync_kernels.sit.teachers.grids import SpeechNetwork

PARTS = 8


class Ear:
    """Resemblyzer's network, averaged over parts of a sound."""

    def __init__(self) -> None:
        self.network = SpeechNetwork()

    def features(self, sounds: Sequence[np.ndarray], rate: int) -> Tensor:
        """(N, 8·256)."""
        rows = []
        for sound in sounds:
            parts = torch.tensor_split(self.network.states(sound, rate), PARTS)
            rows.append(torch.cat([part.mean(0) for part in parts]).nan_to_num())
        return torch.stack(rows)


def take(data: MemorySet, count: int) -> tuple[list[np.ndarray], Tensor]:
    """Some of the sounds, and their digits."""
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
    batch = data.take(index)
    assert isinstance(data.modality, Sound)
    return data.modality.sounds(batch.samples, batch.condition.lengths), batch.labels


def main() -> None:
    """Prints the shares as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=20, help="of each digit")
    parser.add_argument("--out", type=Path, help="writes them here")
    arguments = parser.parse_args()
    config, trained, ear = load_config(arguments.run / CONFIG), load_trained(arguments.run), Ear()
    own = dataclasses.replace(config.data, data=FSDD, data_root=arguments.data_root, split="all")
    plain = dataclasses.replace(own, audio=dataclasses.replace(own.audio, sound="waveform"))
    modality = trained.modality
    assert isinstance(modality, Sound)

    sounds, digits = {}, {}
    for name, data, count in (("train", plain, 1500), ("real", plain, 300), ("represented", own, 300)):
        loaded = load_data(dataclasses.replace(data, split="train" if name == "train" else "test"))
        assert isinstance(loaded, MemorySet)
        sounds[name], digits[name] = take(loaded, count)
    digits["samples"] = torch.arange(trained.num_classes).repeat_interleave(arguments.samples)
    condition = conditions(digits["samples"], trained.lengths)
    drawn = draw(trained.model, build_transport(config.transport), config.sampling, condition, seed=1)
    sounds["samples"] = modality.sounds(drawn, condition.lengths)
    if arguments.out is not None:
        modality.overview(drawn, arguments.out / "samples", columns=arguments.samples, lengths=condition.lengths)

    features = {name: ear.features(own, modality.sample_rate) for name, own in sounds.items()}
    result: dict[str, dict[str, Any]] = {}
    for name in ("real", "represented", "samples"):
        both = torch.cat([features["train"], features[name]])
        heard = linear_probe(both, torch.cat([digits["train"], digits[name]]), len(features["train"]))
        result[name] = {"heard as asked": round(float(heard.float().mean()), 3), "of": len(heard)}
        if name == "samples":
            result[name]["by digit"] = heard.view(trained.num_classes, -1).float().mean(1).tolist()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
