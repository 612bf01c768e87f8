"""What to train on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    data: str = "mnist"
    """mnist | torchvision:NAME | a folder of class folders | FILE.npz | FILE.safetensors (latents)."""
    data_root: Path = Path("data")
    """Where torchvision keeps its files."""
    download: bool = False
    """Let torchvision download what is missing."""
    image_size: int | None = None
    """Side of the square samples in pixels; None keeps that of the data. mnist: 28, or 14 (exact 2x2 averages)."""
    channels: Literal[1, 3] | None = None
    """Grey or colour; None keeps that of the data."""
    flip: bool = False
    """Mirror half of the samples at random."""
    latent_scale: float = 1.0
    """Factor on cached latents; 0.18215 for raw latents of the Stable Diffusion VAE."""
    memory_limit_gb: float = 4.0
    """Image folders that decode to more than this are streamed (0: always); any other data beyond it are refused."""
    workers: int = 4
    """Decoding threads or processes."""
