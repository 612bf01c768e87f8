"""Tensors that are divided among processes, in files: each process writes its part, any number of others reads them.

The files are those of torch.distributed.checkpoint in its safetensors form. What the first process wrote is called
``shard-00001-model-00001-of-00001.safetensors``, and says in its metadata which part of each tensor it has. Nothing in
them is pickled.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from .processes import Processes


def is_divided(tensors: Mapping[str, Tensor]) -> bool:
    """Whether processes hold parts of any of these."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def write_parts(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """Writes what each process holds of some tensors; all of them call it.

    Args:
        folder: made here.
        tensors: by name; of one that is not divided, one process writes all.
        processes: that hold them.

    Raises:
        OSError: one of them cannot write; all raise it.
        RuntimeError: one of them has ended.
    """
    writer = dcp.HuggingFaceStorageWriter(os.fspath(folder), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=processes.group)
    except dcp.api.CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"process {rank}: {reason}") from error


def own_files(folder: Path, processes: Processes) -> list[Path]:
    """What this process wrote there."""
    return sorted(folder.glob(f"shard-{processes.rank + 1:05d}-*.safetensors"))


def read_parts(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads tensors from their parts, unchecked.

    Args:
        folder: what `write_parts` wrote.
        like: tensors of these names that are divided, and of the same shape and type, are read as those are: each
            process reads no more than its part. All others come whole, on the CPU.

    Raises:
        Exception: whatever a damaged file leads to.
    """
    reader = dcp.HuggingFaceStorageReader(os.fspath(folder))
    tensors: dict[str, Tensor] = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        found, dtype = like.get(name), stored.properties.dtype
        if isinstance(found, DTensor) and (found.shape, found.dtype) == (stored.size, dtype):
            tensors[name] = torch.empty_like(found)
        else:
            tensors[name] = torch.empty(stored.size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")  # which is what is meant
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
