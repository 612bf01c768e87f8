"""Settings of `layersync probe`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ....errors import ConfigError
from ...config.data import DataConfig
from ...config.run import OfRun
from ...config.sampling import TransportConfig

MIN_SAMPLES = 8


@dataclass(frozen=True)
class ProbeCommand(OfRun):
    """Measure each block of a trained model and propose a (student, teacher) pair. Writes probe.png and probe.json."""

    out: Path | None = None
    """The picture; default: probe.png in the run, or beside the file. The numbers go beside it, as .json."""
    samples: int = 2000
    """How many samples to take; half of them train the probes, the other half is held out."""
    times: tuple[float, ...] = (0.5, 0.7, 0.9)
    """Noise levels of the inputs: 0 is noise, 1 is data."""
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
        for flag, value, low in (("samples", self.samples, MIN_SAMPLES), ("batch-size", self.batch_size, 1)):
            if value < low:
                raise ConfigError(f"--{flag} {value}: expected at least {low}")
        if not self.times or not all(0 <= t <= 1 for t in self.times):
            raise ConfigError(f"--times {' '.join(map(str, self.times))}: expected numbers from 0 (noise) to 1 (data)")
        if self.out is not None and self.out.suffix.lower() != ".png":
            raise ConfigError(f"--out {self.out}: expected a .png")
