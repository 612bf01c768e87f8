"""Data sets of Hugging Face's `datasets`."""

from __future__ import annotations

import os
from typing import Any

from PIL import Image

from ...errors import DataError, first_line
from ..config.data import DataConfig
from ..extras import optional_module
from .base import SampleSet
from .captions import captioned
from .folders import from_source
from .streaming import Source

PREFIX = "hf:"


def load_huggingface(config: DataConfig) -> SampleSet:
    """``hf:NAME`` of the hub, or ``hf:FOLDER`` that `Dataset.save_to_disk` wrote: its image, class and text columns.

    NAME may be fetched with --download only. --split is that of the data set where it has one. No code of a data set
    runs.

    Raises:
        DataError: it cannot be opened, or has no column of images.
    """
    datasets = optional_module("datasets", f"--data {config.data}", "layersync_kernels[datasets]")
    name = config.data.removeprefix(PREFIX)
    try:
        if os.path.isdir(name):
            found = datasets.load_from_disk(name)
        elif config.download:
            found = datasets.load_dataset(name)
        else:
            raise DataError(f"--data {config.data}: {name} is no folder; add --download to fetch it from the hub")
    except DataError:
        raise
    except Exception as error:  # a package of many parts raises anything
        raise DataError(f"cannot open {config.data}: {first_line(error)}") from error
    if isinstance(found, dict):  # of splits
        wanted = "test" if config.split == "test" else "train"
        if wanted not in found:
            raise DataError(f"{config.data} has the splits {sorted(found)}; expected {wanted}")
        found = found[wanted]
    images = [key for key, feature in found.features.items() if isinstance(feature, datasets.Image)]
    classes = [key for key, feature in found.features.items() if isinstance(feature, datasets.ClassLabel)]
    texts = [key for key, feature in found.features.items() if getattr(feature, "dtype", None) == "string"]
    if not images:
        raise DataError(f"{config.data} has no column of images; it has {', '.join(map(str, found.features))}")
    names = found.features[classes[0]].names if classes else ["all"]

    def load(i: int) -> tuple[Image.Image, int]:
        row: dict[str, Any] = found[i]
        return row[images[0]], int(row[classes[0]]) if classes else 0

    source = Source(len(found), load, lambda i: f"{config.data}[{i}]", [str(own) for own in names])
    captions = list(found[texts[0]]) if texts else [None] * len(found)
    rows = [f"{config.data}[{i}]" for i in range(len(found))]
    return captioned(from_source(source, config, default_channels=None), captions, rows, config)
