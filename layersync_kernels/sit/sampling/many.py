"""Any number of samples, in numbered files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ..batch import Condition
from ..config.sampling import SamplingConfig
from ..console import console
from ..diffusion.transport import Transport
from ..files import save_arrays, write_json
from ..modality.base import cut
from ..models.sit import SiT
from .draw import draw
from .load import Trained

FACTS = "samples.json"
"""Name of the file that says what the others are."""


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn; see `draw`. Called with the condition, and a seed in place of `seed`."""

    model: SiT
    transport: Transport
    sampling: SamplingConfig
    seed: int
    autocast_dtype: torch.dtype | None
    batch_size: int

    def __call__(self, condition: Condition, *, seed: int | None = None) -> Tensor:
        """Samples float32 (N, C, ...)."""
        return draw(
            self.model,
            self.transport,
            self.sampling,
            condition,
            seed=self.seed if seed is None else seed,
            autocast_dtype=self.autocast_dtype,
            batch_size=self.batch_size,
        )


def draw_many(
    drawing: Drawing,
    trained: Trained,
    condition: Condition,
    folder: Path,
    *,
    shard: int,
    files: bool,
    device: torch.device,
) -> None:
    """Writes samples into ``samples_00000.npz`` and so on; files that are there are left as they are.

    Each file has a noise of its own, so that it does not matter where a call was stopped. Images are uint8
    (N, H, W, C) under "arr_0" and labels under "arr_1", as the evaluation suite of ADM reads them; see
    `Modality.arrays` for all else, with labels under "labels".

    Args:
        drawing: how.
        trained: what the samples stand for.
        condition: of all samples, on the CPU.
        folder: of the files, made where it is missing.
        shard: samples in a file.
        files: also write each sample by itself, into ``files/``.
        device: of the model.

    Raises:
        ConfigError: the folder holds samples of other settings.
        CheckpointError: samples that are not finite.
    """
    facts: dict[str, Any] = {
        "seed": drawing.seed,
        "shard": shard,
        "samples": len(condition),
        "labels": condition.labels.unique().tolist(),
        "sampling": asdict(drawing.sampling),
        "weights": _digest(drawing.model),
    }
    there = folder / FACTS
    if there.is_file():
        try:
            earlier = json.loads(there.read_bytes())
        except ValueError:
            earlier = None
        if earlier != json.loads(json.dumps(facts)):
            raise ConfigError(
                f"{folder} holds samples of other settings or weights; choose another --out, or remove it"
            )
    else:
        write_json(there, facts)
    parts = condition.split(shard)
    steps = track(range(len(parts)), "sampling", console=console, disable=not console.is_terminal)
    for number in steps:
        path = folder / f"samples_{number:05d}.npz"
        if path.is_file():
            continue
        own = parts[number]
        seed = int(np.random.SeedSequence((drawing.seed, number)).generate_state(1)[0]) >> 1
        samples = drawing(own.to(device), seed=seed).cpu()
        if not samples.isfinite().all():
            raise CheckpointError("the samples are not finite; the weights may have diverged")
        if files:
            for i, sample in enumerate(cut(samples, own.lengths), start=number * shard):
                trained.modality.save(sample, folder / "files" / f"{i:06d}")
        save_arrays(path, trained.arrays(samples, own))


def _digest(model: SiT) -> float:
    """A number that other weights hardly share."""
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))
