"""Any number of samples, in numbered files."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
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
from ..distributed.processes import ALONE, Processes
from ..files import save_arrays, write_json
from ..modality.base import cut
from ..models.sit import SiT
from .draw import draw
from .load import Trained

logger = logging.getLogger(__name__)

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

    def __call__(self, condition: Condition, *, seed: int | None = None, processes: Processes = ALONE) -> Tensor:
        """Samples float32 (N, C, ...)."""
        return draw(
            self.model,
            self.transport,
            self.sampling,
            condition,
            seed=self.seed if seed is None else seed,
            autocast_dtype=self.autocast_dtype,
            batch_size=self.batch_size,
            processes=processes,
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
    processes: Processes = ALONE,
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
        processes: each writes files of its own, and waits for no other one.

    Raises:
        ConfigError: the folder holds samples of other settings.
        CheckpointError: samples that are not finite, or cannot be written.
    """
    facts: dict[str, Any] = {
        "seed": drawing.seed,
        "shard": shard,
        "samples": len(condition),
        "labels": condition.labels.unique().tolist(),
        "sampling": asdict(drawing.sampling),
        "weights": _digest(drawing.model),
    }
    parts = condition.split(shard)

    def path_of(number: int) -> Path:
        return folder / f"samples_{number:05d}.npz"

    def missing() -> str:
        with writing_samples():
            _check_facts(folder, facts)
        return json.dumps([number for number in range(len(parts)) if not path_of(number).is_file()])

    if len(parts) < processes.world:
        logger.warning(
            "%d files for %d processes: some have nothing to do; a smaller --shard gives all of them work",
            len(parts),
            processes.world,
        )
    # One of them looks: the others might already see what it has written.
    own_numbers = json.loads(processes.by_first(missing))[processes.rank :: processes.world]
    for number in track(own_numbers, "sampling", console=console, disable=not console.is_terminal or console.quiet):
        own = parts[number]
        seed = int(np.random.SeedSequence((drawing.seed, number)).generate_state(1)[0]) >> 1
        samples = drawing(own.to(device), seed=seed).cpu()
        if not samples.isfinite().all():
            raise CheckpointError("the samples are not finite; the weights may have diverged")
        with writing_samples():
            if files:
                for i, sample in enumerate(cut(samples, own.lengths), start=number * shard):
                    trained.modality.save(sample, folder / "files" / f"{i:06d}")
            save_arrays(path_of(number), trained.arrays(samples, own))


@contextlib.contextmanager
def writing_samples() -> Iterator[None]:
    """Raises CheckpointError where what is written inside cannot be."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write the samples: {error}") from error


def _check_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes what the samples of a folder are, or compares it with what is there."""
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


def _digest(model: SiT) -> float:
    """A number that other weights hardly share."""
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))
