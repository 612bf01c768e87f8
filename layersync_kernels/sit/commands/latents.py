"""`layersync latents`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import CheckpointError, ConfigError
from ..config import at_least
from ..config.data import DataConfig
from ..config.run import StartingPoint
from ..console import start_logging
from ..data.latents_folder import write_latents
from ..data.registry import load_data
from ..device import resolve_device
from ..modality.autoencoder import Autoencoder
from .arguments import parse, starting_point


@dataclass(frozen=True)
class LatentsCommand(StartingPoint):
    """Encode a data set with an autoencoder of diffusers once; train on the folder --out with `--data`.

    Called again, it goes on at the first file that is missing.
    """

    autoencoder: str = ""
    """A folder that `save_pretrained` wrote, or a name of the hub: AutoencoderKL for images, AutoencoderOobleck for
    sounds (--sound waveform), AutoencoderKLWan or AutoencoderKLCogVideoX for films."""
    out: Path = Path("latents")
    """The folder to write: fp16 means and standard deviations of the posterior; twice that with --flip."""
    data: DataConfig = field(default_factory=DataConfig)
    shard: int = 1000
    """Samples in a file."""
    batch_size: int = 16
    """Samples at a time."""
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""


def latents_main(argv: Sequence[str]) -> int:
    """`layersync latents`."""
    start_logging()
    default = LatentsCommand(data=starting_point(argv).data)
    command = parse(LatentsCommand, argv, default=default, command="latents")
    if not command.autoencoder:
        raise ConfigError("--autoencoder: name one; for images for instance stabilityai/sd-vae-ft-ema")
    at_least(1, shard=command.shard, batch_size=command.batch_size)
    command.data.validate()
    autoencoder = Autoencoder(command.autoencoder, resolve_device(command.device))
    data = load_data(command.data)
    try:
        index = write_latents(
            autoencoder,
            data,
            command.out,
            source=command.data.data,
            flip=command.data.flip,
            shard=command.shard,
            batch_size=command.batch_size,
        )
    except OSError as error:
        raise CheckpointError(f"cannot write {command.out}: {error}") from error
    shape = " x ".join(map(str, index.shape))
    print(f"{command.out}: {index.samples} latents of {shape}; train on them with --data {command.out}")
    return 0
