"""What to train on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from . import at_least, positive, require
from .audio import AudioConfig
from .motion import MotionConfig
from .video import VideoConfig

NAMED_SETS = ("mnist", "moving-mnist", "bodies", "cifar10", "fsdd", "cmu-mocap")
"""What `DataConfig.data` names rather than points to, whatever files of these names there are."""


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    data: str = "mnist"
    """mnist | torchvision:NAME | a folder of class folders | FILE.npz | FILE.safetensors (latents) | URL of a folder
    of latents, or of tars."""
    data_root: Path = Path("data")
    """Where torchvision and the named sets keep their files."""
    download: bool = False
    """Download what is missing of a named set."""
    split: Literal["all", "train", "test"] = "all"
    """train or test: the published split where there is one, else nine tenths and one, the same ones always."""
    text_encoder: str | None = None
    """What turns captions into embeddings: hashed | transformers/NAME. None: captions are not read."""
    image_size: int | tuple[int, int] | None = None
    """Side of square samples in pixels, or height and width; None keeps the side of the data. mnist: 28, or 14 (exact
    2x2 averages)."""
    buckets: tuple[str, ...] = ()
    """Several sizes in one run, HEIGHTxWIDTH each: images go to the size with the nearest proportions."""
    channels: Literal[1, 3] | None = None
    """Grey or colour; None keeps that of the data."""
    flip: bool = False
    """Mirror half of the samples at random."""
    latent_scale: float = 1.0
    """Factor on cached latents; 0.18215 for raw latents of the Stable Diffusion VAE."""
    latent_sample: Literal["posterior", "mean"] = "posterior"
    """Of a folder of latents: draw from the posterior anew each time, or take its mean."""
    memory_limit_gb: float = 4.0
    """Memory for samples, in GiB: images that decode to more, and folders of latents, are streamed from disk by worker
    processes; arrays that take more are refused. 0: stream all of them."""
    workers: int = 4
    """Decoding threads or processes."""
    prefetch: int = 2
    """Batches that each of these processes prepares."""
    shuffle_shards: int | None = None
    """Files of many samples, as latents and tars are, that are shuffled together where they are streamed; None: as many
    as have 10,000 samples."""
    cache: Path | None = None
    """Folder for copies of files behind URLs; None: cache in --data-root."""
    cache_limit_gb: float = 32.0
    """Disk for these copies, in GiB."""
    audio: AudioConfig = field(default_factory=AudioConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)
    video: VideoConfig = field(default_factory=VideoConfig)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that samples are wanted in; None: those of the data."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def bucket_sizes(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths of `buckets`.

        Raises:
            ConfigError: one is no HEIGHTxWIDTH.
        """
        sizes = []
        for name in self.buckets:
            height, _, width = name.partition("x")
            fits = height.isdecimal() and width.isdecimal() and int(height) and int(width)
            require(bool(fits), f"--buckets {name}: expected HEIGHTxWIDTH such as 32x48")
            sizes.append((int(height), int(width)))
        return tuple(sizes)

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        at_least(0, memory_limit_gb=self.memory_limit_gb, workers=self.workers)
        at_least(1, prefetch=self.prefetch, shuffle_shards=self.shuffle_shards)
        positive(cache_limit_gb=self.cache_limit_gb)
        for side in self.size or ():
            at_least(1, image_size=side)
        require(
            not (self.bucket_sizes and self.size), "--buckets are sizes of images themselves: leave --image-size out"
        )
        for group in (self.audio, self.motion, self.video):
            group.validate()
