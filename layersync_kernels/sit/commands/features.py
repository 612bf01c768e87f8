"""`layersync features`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ...errors import ConfigError
from ..config.data import DataConfig
from ..config.run import StartingPoint
from ..console import start_logging
from ..data.base import SampleSet
from ..data.registry import load_data
from ..data.user import is_python_path
from ..device import resolve_device, resolve_precision
from ..modality.images import Images
from ..teachers.features import compute_features
from ..teachers.grids import load_any
from .arguments import parse, starting_point


@dataclass(frozen=True)
class FeaturesCommand(StartingPoint):
    """Run a teacher over a data set once. Its features, for `layersync train --features`, go to the file --out."""

    teacher: str = "efficientnet-lite0"
    """efficientnet-lite0 | dinov2-vits14, -vitb14, -vitl14 | timm/NAME | hub/REPO:NAME | hub/FOLDER:NAME, of images
    and of films frame by frame; resemblyzer of sounds; MODULE:FUNCTION of anything."""
    out: Path = Path("features.safetensors")
    """The file to write: fp16, N x tokens x channels; twice that with --flip, for the mirrored images."""
    data: DataConfig = field(default_factory=DataConfig)
    grid: int | tuple[int, ...] | None = None
    """Tokens of the model to be trained: per side of images, where the teacher can (others are interpolated); of other
    data along each dimension."""
    teacher_size: int | None = None
    """Side of the teacher's images in pixels."""
    teacher_weights: Path | None = None
    """Read the teacher's weights from this file instead of downloading them."""
    batch_size: int = 64
    """Samples at a time."""
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto: bf16 where the device is faster with it, else fp32."""


def _grid(command: FeaturesCommand, data: SampleSet) -> tuple[int, ...] | None:
    """Along each dimension of a sample; None: as the teacher of images likes it."""
    grid, extent = command.grid, data.spec.extent
    if isinstance(grid, int) and (isinstance(data.modality, Images) or len(extent) == 1):
        grid = (grid,) * len(extent)
    if grid is None and isinstance(data.modality, Images) and not is_python_path(command.teacher):
        return None
    if grid is None or isinstance(grid, int) or len(grid) != len(extent) or min(grid) < 1:
        raise ConfigError(
            f"--grid {grid}: expected {len(extent)} numbers for samples of {data.spec}, the tokens of the model along "
            "each dimension: its size over that of a patch"
        )
    return grid


def features_main(argv: Sequence[str]) -> int:
    """`layersync features`."""
    start_logging()
    command = parse(FeaturesCommand, argv, default=FeaturesCommand(data=starting_point(argv).data), command="features")
    if command.batch_size < 1:
        raise ConfigError(f"--batch-size {command.batch_size}: expected at least 1")
    device = resolve_device(command.device)
    data = load_data(command.data, device)
    teacher = load_any(
        command.teacher, data.modality, _grid(command, data), size=command.teacher_size, weights=command.teacher_weights
    )
    shape = compute_features(
        teacher.to(device),
        data,
        command.out,
        source=command.data.data,
        flip=command.data.flip,
        batch_size=command.batch_size,
        autocast_dtype=resolve_precision(command.precision, device),
    )
    print(f"{command.out}: {' x '.join(map(str, shape))} features of {teacher.name}")
    return 0
