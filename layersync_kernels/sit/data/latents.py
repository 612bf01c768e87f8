"""Latents of an autoencoder, computed before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from ...errors import DataError
from ..config.data import DataConfig
from .memory import MemorySet, memory_set, naming


def load_safetensors(path: Path, config: DataConfig) -> MemorySet:
    """Latents of a .safetensors file; raises DataError where it holds none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if "latents" not in tensors:
        raise DataError(f"{path} holds {sorted(tensors)}; expected 'latents' (N, C, H, W) and 'labels' (N,)")
    with naming(path):
        return from_latents(tensors["latents"], tensors.get("labels"), config)


def from_latents(latents: Tensor, labels: np.ndarray | Tensor | None, config: DataConfig) -> MemorySet:
    """A set of latents (N, C, H, W), H = W."""
    if latents.ndim != 4 or len(latents) == 0 or latents.shape[2] != latents.shape[3]:
        raise DataError(f"latents have shape {tuple(latents.shape)}; expected (N, C, H, W) with H = W and N > 0")
    if not latents.is_floating_point():
        raise DataError(f"latents are {latents.dtype}; expected float16, bfloat16 or float32")
    if config.image_size not in (None, latents.shape[-1]):
        raise DataError(
            f"latents are {latents.shape[-1]} wide and cannot be resized to --image-size {config.image_size}"
        )
    return memory_set(latents, labels, config, latent=True)
