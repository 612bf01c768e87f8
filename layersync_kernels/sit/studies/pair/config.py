"""Settings of `layersync probe`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ....errors import ConfigError
from ...config import at_least
from ...config.data import DataConfig
from ...config.run import OfRun
from ...config.sampling import TransportConfig

MIN_SAMPLES = 8


@dataclass(frozen=True)
class ProbeCommand(OfRun):
    """Measure each block of a trained model, or of several, and propose a (student, teacher) pair. Writes probe.png and
    probe.json.
    """

    out: Path | None = None
    """The picture; default: probe.png in the run, or beside the file. The numbers go beside it, as .json."""
    samples: int = 2000
    """How many samples to take; half of them train the probes, the other half is held out."""
    times: tuple[float, ...] = (0.5, 0.7, 0.9, 1.0)
    """Noise levels of the inputs: 0 is noise, 1 the clean sample. The pair rests on the noised ones."""
    beside: tuple[Path, ...] = ()
    """Other runs of the same data, to be measured on the same samples, noise and times, and drawn beside it."""
    teacher: str | None = None
    """Also compare the blocks with a pretrained network: efficientnet-lite0 | dinov2-vits14, -vitb14, -vitl14 |
    timm/NAME | hub/REPO:NAME | hub/FOLDER:NAME, of images and of films frame by frame; resemblyzer of sounds;
    MODULE:FUNCTION of anything. It sees the clean samples."""
    teacher_size: int | None = None
    """Side of that network's images in pixels."""
    teacher_weights: Path | None = None
    """Read that network's weights from this file instead of downloading them."""
    features: Path | None = None
    """Features that `layersync features` computed of the data; the network itself is not needed then."""
    batch_size: int = 64
    """Samples in one forward pass."""
    seed: int = 0
    """Fixes which samples are taken, and their noise."""
    data: DataConfig = field(default_factory=DataConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights or the last ones."""
    num_heads: int | None = None
    """Attention heads, for a lone file of unusual size: weights do not tell them."""
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        at_least(MIN_SAMPLES, samples=self.samples)
        at_least(1, batch_size=self.batch_size, teacher_size=self.teacher_size)
        at_least(0, seed=self.seed)
        if not self.times or not all(0 <= t <= 1 for t in self.times):
            raise ConfigError(f"--times {' '.join(map(str, self.times))}: expected numbers from 0 (noise) to 1 (data)")
        if self.teacher is None and (self.teacher_weights is not None or self.teacher_size is not None):
            raise ConfigError("--teacher-weights and --teacher-size are of a --teacher; name it")
        if self.data.buckets:
            raise ConfigError(
                f"--buckets {' '.join(self.data.buckets)}: samples of one size are probed; give --buckets without a "
                "size, and --image-size"
            )
        if self.out is not None and self.out.suffix.lower() != ".png":
            raise ConfigError(f"--out {self.out}: expected a .png")
