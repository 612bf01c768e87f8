"""Latents of an autoencoder, computed before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import DataError
from ..config.data import DataConfig
from .memory import MemorySet, check_fits, memory_set, naming

TYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def load_safetensors(config: DataConfig) -> MemorySet:
    """A .safetensors file: tensors ``latents`` (N, C, H, W) and, for more than one class, ``labels`` (N,).

    The file is mapped into memory: the system reads it page by page, as training asks for it. It counts against
    `config.memory_limit_gb` all the same, for an epoch asks for all of it.

    Raises:
        DataError: it holds no latents, or more than the limit; names the file.
    """
    path = Path(config.data)
    with naming(path):
        try:
            with safe_open(path, framework="pt") as file:  # refuses a header that does not fit the file's length
                keys = list(file.keys())
                if "latents" not in keys:
                    raise DataError(f"holds {sorted(keys)}; expected 'latents' (N, C, H, W) and 'labels' (N,)")
                wanted = [key for key in ("latents", "labels") if key in keys]
                tensors = {key: file.get_tensor(key) for key in wanted}  # mapped: nothing is read yet
        except DataError:
            raise
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot be read: {error}") from error
        what = " and ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items())
        check_fits(f"holds {what}", sum(tensor.nbytes for tensor in tensors.values()), config, instead="")
        return from_latents(tensors["latents"], tensors.get("labels"), config)


def from_latents(latents: Tensor, labels: np.ndarray | Tensor | None, config: DataConfig) -> MemorySet:
    """Latents of one to three dimensions, (N, C, ...), to a MemorySet.

    They keep their type: a batch at a time becomes fp32.

    Raises:
        DataError: another shape or type, or a size that they cannot be resized to.
    """
    if not 3 <= latents.ndim <= 5 or 0 in latents.shape:
        raise DataError(
            f"latents have shape {tuple(latents.shape)}; expected (N, C, H, W), (N, C, L) or (N, C, T, H, W) with N > 0"
        )
    if latents.dtype not in TYPES:
        raise DataError(f"latents are {latents.dtype}; expected float16, bfloat16 or float32")
    if config.size not in (None, tuple(latents.shape[-2:])):
        raise DataError(
            f"latents are {tuple(latents.shape[-2:])} and cannot be resized to --image-size {config.image_size}"
        )
    return memory_set(latents, labels, config, latent=True)
