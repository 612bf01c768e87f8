"""How fast data comes: `python benchmarks/data_throughput.py [OUT.json]`.

Images per second of CPU time of each kind of set, of one thread of one process with no worker beside it: pixels 3x32x32
in memory, latents 4x32x32 (of 256x256 images) in memory, and streamed from files whose pages the system holds, and JPEG
of 64x64 in tars. The best of several rounds; a batch is 256. CPU time, so that other work on the machine counts less.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from layersync_kernels.runtime.memory import keep_freed_memory
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.data.base import SampleSet
from layersync_kernels.sit.data.latents_index import shard_name
from layersync_kernels.sit.data.memory import memory_set
from layersync_kernels.sit.data.registry import load_data

BATCH, ROUNDS, BATCHES = 256, 7, 12
LATENTS, SHARD, TARS, IMAGES = 12_000, 1000, 4, 500


def main() -> None:
    """Prints a line for each kind."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does
    rates = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_latents(folder / "latents")
        _write_tars(folder / "tars")
        pixels = torch.randint(0, 256, (20_000, 3, 32, 32), dtype=torch.uint8)
        rates["memory"] = _rate(memory_set(pixels, None, DataConfig()))
        for kind, limit in (("latents in memory", 4.0), ("latents streamed", 0.0)):
            for what, options in (
                ("", {}),
                (", --flip", {"flip": True}),
                (", --latent-sample mean", {"latent_sample": "mean"}),
            ):
                rates[kind + what] = _rate(_load(folder / "latents", memory_limit_gb=limit, **options))
        rates["tars streamed, JPEG 64x64"] = _rate(
            _load(folder / "tars", memory_limit_gb=0.0, image_size=64), batches=2
        )
    for kind, rate in rates.items():
        print(f"{kind:40} {rate:10,.0f} images/s")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"batch": BATCH, "images_per_second": rates}, indent=2) + "\n")


def _load(folder: Path, **options: object) -> SampleSet:
    return load_data(DataConfig(data=str(folder), workers=0, **options))  # type: ignore[arg-type]


def _rate(data: SampleSet, batches: int = BATCHES) -> float:
    stream = data.batches(BATCH, seed=0)
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in itertools.islice(stream, batches):
            pass
        best = min(best, time.process_time() - started)
    return batches * BATCH / best


def _write_latents(folder: Path) -> None:
    folder.mkdir()
    facts = {"source": "noise", "autoencoder": "", "of": "images", "samples": LATENTS, "shard": SHARD, "flip": True}
    facts |= {"shape": [4, 32, 32], "variable": False, "num_classes": 1, "class_names": ["all"], "shift": [0.0]}
    (folder / "index.json").write_text(json.dumps(facts | {"scale": [0.18215], "sample_rate": 44_100}))
    parts = ("mean", "std", "mean_mirrored", "std_mirrored")
    for number in range(LATENTS // SHARD):
        tensors = {part: torch.rand(SHARD, 4, 32, 32).half() for part in parts}
        save_file(tensors | {"labels": torch.zeros(SHARD, dtype=torch.long)}, folder / shard_name(number))


def _write_tars(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(TARS):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for i in range(IMAGES):
                coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                packed = io.BytesIO()
                coarse.resize((64, 64), Image.Resampling.BICUBIC).save(packed, format="JPEG")
                info = tarfile.TarInfo(f"{i}.jpg")
                info.size = len(packed.getvalue())
                archive.addfile(info, io.BytesIO(packed.getvalue()))


if __name__ == "__main__":
    main()
