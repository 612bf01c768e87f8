"""Several runs beside each other: what they are called, and whether they are of the same data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ....errors import ConfigError, DataError
from ...checkpoints.local import run_of
from ...config.io import load_config
from ...config.paths import with_absolute_paths
from ...config.run import CONFIG, TrainConfig
from ...sampling.load import Trained

_SAMPLES = (
    *("data", "split", "text_encoder", "image_size", "buckets", "channels", "latent_scale", "latent_sample"),
    *("audio", "motion", "video"),
)
"""Settings that say what samples are; the others say where they lie and how they are read."""


def names_of(sources: Sequence[Path]) -> list[str]:
    """For each run, checkpoint or file as much of the end of its path as tells it from the others.

    Raises:
        ConfigError: one is given twice.
    """
    paths = [source.resolve() for source in sources]
    for source, path in zip(sources, paths, strict=True):
        if paths.count(path) > 1:
            raise ConfigError(f"--beside: {source} is given twice; name each run once")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path.parts[-length:]) for path in paths]


def check_same_data(first: Path, trained: Trained, other: Path, beside: Trained) -> None:
    """Whether two models can be measured on the same samples, noise and times.

    Args:
        first: where the first is.
        trained: it.
        other: where the other is.
        beside: it.

    Raises:
        DataError: their samples differ in shape, form or normalisation, or their runs were of other data.
        ConfigError: their runs noise along other paths.
    """
    apart = f"; probe {other} by itself"
    if beside.spec != trained.spec:
        raise DataError(f"--beside {other}: its samples are {beside.spec}, those of {first} {trained.spec}{apart}")
    if beside.modality != trained.modality:
        raise DataError(
            f"--beside {other}: its samples are {beside.modality.kind}, those of {first} {trained.modality.kind}, or "
            f"normalised otherwise{apart}"
        )
    if beside.num_classes != trained.num_classes:
        raise DataError(
            f"--beside {other}: its data has {beside.num_classes} classes, that of {first} {trained.num_classes}{apart}"
        )
    configs = _config(first), _config(other)
    if configs[0] is None or configs[1] is None:
        return
    own, its = configs[0].data, configs[1].data
    for name in _SAMPLES:
        if getattr(own, name) != getattr(its, name):
            raise DataError(
                f"--beside {other}: it was trained with {name} {getattr(its, name)}, {first} with "
                f"{getattr(own, name)}: their data differ{apart}"
            )
    paths = configs[0].transport.path_type, configs[1].transport.path_type
    if paths[0] != paths[1]:
        raise ConfigError(
            f"--beside {other}: it was trained along the path {paths[1]}, {first} along {paths[0]}: equal times are "
            f"not equal noise{apart}"
        )


def _config(source: Path) -> TrainConfig | None:
    """That of the run, with paths that can be compared; None: a lone file."""
    run = run_of(source)
    return None if run is None else with_absolute_paths(load_config(run / CONFIG))
