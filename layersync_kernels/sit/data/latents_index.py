"""What a folder of latents says of itself, and whether its files fit that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import DataError
from ..config.io import build, parse_json
from ..modality.base import check_fps
from ..modality.latents import Latents
from ..spec import SampleSpec

INDEX = "index.json"


@dataclass(frozen=True)
class LatentsIndex:
    """What ``index.json`` says.

    Attributes:
        source: the data.
        autoencoder: its name.
        of: the modality that it encodes.
        samples: how many there are.
        shard: how many are in a file.
        flip: whether the latents of mirrored samples are there too.
        shape: of a sample's latents, (c, ...).
        variable: whether they have lengths.
        num_classes, class_names: of the data.
        shift, scale: per channel, or one for all: a model's latents are (latents - shift) * scale.
        sample_rate: of sounds.
        fps: of films, before they were encoded.
    """

    source: str
    autoencoder: str
    of: str
    samples: int
    shard: int
    flip: bool
    shape: tuple[int, ...]
    variable: bool
    num_classes: int
    class_names: tuple[str, ...]
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    sample_rate: int
    fps: float = Latents.fps

    def __post_init__(self) -> None:
        if min(self.samples, self.shard, self.num_classes) < 1 or not all(self.scale):
            raise ValueError("samples, shard, num_classes and scale are positive numbers")
        SampleSpec.of(self.shape)
        check_fps(self.fps)

    @classmethod
    def parse(cls, content: bytes) -> LatentsIndex:
        """Of the file's content.

        Raises:
            ValueError: it is none.
        """
        return build(cls, parse_json(content))

    @property
    def files(self) -> int:
        """How many there are."""
        return -(-self.samples // self.shard)

    @property
    def sizes(self) -> list[int]:
        """Samples in each file."""
        return [min(self.shard, self.samples - number * self.shard) for number in range(self.files)]

    @property
    def parts(self) -> set[str]:
        """Names of what each file holds."""
        mirrored = {"mean_mirrored", "std_mirrored"} if self.flip else set()
        return {"mean", "std", "labels"} | mirrored | ({"lengths"} if self.variable else set())

    @property
    def modality(self) -> Latents:
        """Of the latents."""
        channels = self.shape[0]
        return Latents(
            mean=self.shift * channels if len(self.shift) == 1 else self.shift,
            std=tuple(1 / factor for factor in (self.scale * channels if len(self.scale) == 1 else self.scale)),
            of=self.of,
            autoencoder=self.autoencoder,
            sample_rate=self.sample_rate,
            fps=self.fps,
        )

    def check(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Whether what a file holds is what it should; latents themselves are not read.

        Raises:
            DataError: it is not.
        """
        if missing := self.parts - tensors.keys():
            raise DataError(f"there is no {', '.join(sorted(missing))} in it; the files do not fit {INDEX}")
        size = self.sizes[number]
        for name in sorted(self.parts):
            latent = name not in ("labels", "lengths")
            shape, dtype = (size, *(self.shape if latent else ())), torch.float16 if latent else torch.int64
            own = tensors[name]
            if (tuple(own.shape), own.dtype) != (shape, dtype):
                raise DataError(
                    f"{name} is {tuple(own.shape)} of {own.dtype}, expected {shape} of {dtype}; the files do not fit "
                    f"{INDEX}"
                )
        least, most = map(int, tensors["labels"].aminmax())
        if least < 0 or most >= self.num_classes:
            raise DataError(f"labels are not those of {self.num_classes} classes: they go from {least} to {most}")
        if self.variable:
            least, most = map(int, tensors["lengths"].aminmax())
            if least < 1 or most > self.shape[1]:
                raise DataError(f"lengths go from {least} to {most}; expected 1 to {self.shape[1]}")


def shard_name(number: int) -> str:
    """Of a file of latents."""
    return f"latents_{number:05d}.safetensors"
