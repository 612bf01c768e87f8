"""A run's weights for others: one safetensors file, or a folder for diffusers, which say themselves what they are.

The metadata of a safetensors file map strings to strings. Under `KEY` stands JSON, the record: see `Record`. It is read
as any JSON of a file is, against the dataclass, so that a file from anywhere can be given to `layersync sample`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ..config.io import build, parse_json
from ..config.loss import LayerSyncConfig
from ..config.model import ModelConfig
from ..config.sampling import SamplingConfig, TransportConfig
from ..files import TEMPORARY, atomic_path, flush, write_json
from ..models.sit import SiT
from .diffusers_keys import (
    CONFIG_FILE,
    TIME_FILE,
    TIME_WEIGHT,
    TRANSFORMER,
    WEIGHTS_FILE,
    diffusers_config,
    find_diffusers,
    refit_time,
    to_diffusers,
)
from .state import DataFacts
from .weights import is_finite

KEY = "layersync"
"""Of the metadata."""
CARD = "README.md"
MARK = "library_name: layersync-kernels"
"""A line of every card that is written here."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MOST_VALUES = 2**28
"""Of a sample; a model for larger ones is not believed, as its positions and its noise would fill the memory."""


@dataclass(frozen=True)
class Record:
    """What an exported file is.

    Attributes:
        version: of the library.
        which: of the run's weights: "ema", "model" or "ema-DECAY".
        step: optimiser steps done.
        samples_seen: in training.
        dataset: name of the data.
        model: its settings; `init` is left out.
        data: what the model was trained on.
        transport: its interpolant, and what it predicts.
        sampling: how samples are drawn.
        layersync: the pairs and their weights.
    """

    version: str
    which: str
    step: int
    samples_seen: int
    dataset: str
    model: ModelConfig
    data: DataFacts
    transport: TransportConfig
    sampling: SamplingConfig
    layersync: LayerSyncConfig = field(default_factory=LayerSyncConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.step <= self.samples_seen:
            raise ValueError(f"step is {self.step} and samples_seen {self.samples_seen}; expected 0 <= step <= samples")
        if math.prod(self.data.shape) > _MOST_VALUES:
            raise ValueError(f"a sample of {self.data.shape} has more than {_MOST_VALUES} values")
        for settings in (self.model, self.transport, self.sampling):
            settings.validate()


def read_record(file: Path) -> Record | None:
    """What a file of weights says that it is; None: it says nothing, or is no safetensors file.

    Raises:
        CheckpointError: what it says is no record; names the file and what is wrong.
    """
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(KEY)
        return None if text is None else build(Record, parse_json(text.encode()))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the metadata of {file}: {error}") from error


def record_of(path: Path) -> Record | None:
    """The same of an exported file or folder; None: it is neither."""
    return read_record(find_diffusers(path) or path)


def write_safetensors(path: Path, model: SiT, record: Record, *, dtype: torch.dtype, overwrite: bool = False) -> Path:
    """Writes weights under their published names, and the record, as one file. Returns where it is.

    Args:
        path: of the file.
        model: with the weights.
        record: what they are.
        dtype: of the file.
        overwrite: replace a file that is there.

    Raises:
        ConfigError: the file is there.
        CheckpointError: a number is beyond the range of `dtype`, or the file cannot be written; what was there stays.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        what = "is a folder; name a file" if path.is_dir() else "exists; name another file, or give --overwrite"
        raise ConfigError(f"--out {path} {what}")
    _save(path, model.state_dict(), dtype, record)
    return path


def write_diffusers(
    folder: Path, model: SiT, record: Record, card: str, *, dtype: torch.dtype, overwrite: bool = False
) -> Path:
    """Writes a folder whose transformer/ `DiTTransformer2DModel.from_pretrained` takes, and a card. Returns the folder.

    Args:
        folder: of the export.
        model: with the weights.
        record: what they are.
        card: text of its README.md.
        dtype: of the files.
        overwrite: replace an export that is there.

    Raises:
        ConfigError: diffusers' class cannot express the model; the folder is there, and is no export or not to be
            replaced.
        CheckpointError: as `write_safetensors`.
    """
    config = diffusers_config(model, variable=record.data.variable)
    if folder.exists():
        if not overwrite:
            raise ConfigError(f"--out {folder} exists; name another folder, or give --overwrite")
        if not is_card(folder / CARD) or not (folder / TRANSFORMER / WEIGHTS_FILE).is_file():
            raise ConfigError(
                f"--out {folder} is no export, and --overwrite replaces nothing else; name another folder"
            )
    tensors = model.state_dict()
    refitted = {**tensors, TIME_WEIGHT: refit_time(tensors[TIME_WEIGHT])}
    temporary = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    old = folder.with_name(f"{TEMPORARY}{os.getpid()}-old-{folder.name}")
    inner = temporary / TRANSFORMER
    try:
        inner.mkdir(parents=True)
        write_json(inner / CONFIG_FILE, config)
        _save(inner / WEIGHTS_FILE, to_diffusers(refitted, model.depth), dtype, record)
        _save(inner / TIME_FILE, {TIME_WEIGHT: tensors[TIME_WEIGHT]}, dtype)
        write_card(temporary / CARD, card)
        flush(inner)
        flush(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}") from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def write_card(path: Path, text: str) -> Path:
    """Writes a card, and returns where it is.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return path


def is_card(path: Path) -> bool:
    """Whether that file was written by `write_card`, and may be replaced."""
    try:
        return MARK in path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False


def _save(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, record: Record | None = None) -> None:
    cast = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    if beyond := [name for name, tensor in cast.items() if not is_finite(tensor)]:
        raise CheckpointError(f"{beyond[0]} has numbers that are not finite in {dtype}; give another --dtype")
    metadata = {"format": "pt"}  # which transformers and diffusers ask for
    if record is not None:
        metadata[KEY] = json.dumps(dataclasses.asdict(record), default=os.fspath)
    try:
        with atomic_path(path) as temporary:
            save_file(cast, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
