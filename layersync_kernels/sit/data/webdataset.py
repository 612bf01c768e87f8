"""Images in tar files, as WebDataset names them: NAME.jpg beside NAME.cls, NAME.txt or NAME.json.

By tarfile of the standard library, which reads them member by member and needs no package.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ...errors import DataError
from ..config.data import DataConfig
from .base import SampleSet
from .captions import captioned
from .folders import check_image, from_source
from .media import mostly
from .memory import limit_bytes
from .streaming import Source

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_webdataset(name: str) -> bool:
    """Whether a name is that of a tar file, several (``{000..009}.tar``), or a folder of such."""
    return name.endswith(".tar") or mostly(name, {".tar"})


def load_webdataset(config: DataConfig) -> SampleSet:
    """Tar files of images; ``.cls`` holds the class, ``.txt`` a caption, ``.json`` either by "label" and "caption".

    What is packed is held in memory, and counts against `config.memory_limit_gb`.

    Raises:
        DataError: a file that is missing or no tar, no images in any, or a sample without class among others with one.
    """
    groups: dict[str, dict[str, bytes]] = {}
    size = 0
    for path in _paths(config.data):
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    suffix = member.name.rpartition("/")[2].partition(".")[2]
                    if not member.isfile() or not suffix:
                        continue
                    size += member.size
                    if size > max(limit_bytes(config), 1):
                        raise DataError(
                            f"{path}: what is packed is more than --memory-limit-gb {config.memory_limit_gb:g}; raise "
                            "it, or unpack the files into a folder, which is read as training goes"
                        )
                    key = f"{path}:{member.name[: len(member.name) - len(suffix) - 1]}"
                    opened = archive.extractfile(member)
                    assert opened is not None  # of a file
                    groups.setdefault(key, {})[f".{suffix.lower()}"] = opened.read()
        except (OSError, tarfile.TarError, EOFError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
    samples = {key: parts for key, parts in groups.items() if any(suffix in parts for suffix in IMAGES)}
    if not samples:
        raise DataError(f"{config.data} holds no images: expected {', '.join(IMAGES)}")
    names, parts = list(samples), list(samples.values())
    facts = [_facts(name, part) for name, part in samples.items()]
    labels, classes = _labels(config.data, names, [fact.get("label") for fact in facts])

    def load(i: int) -> tuple[Image.Image, int]:
        packed = next(parts[i][suffix] for suffix in IMAGES if suffix in parts[i])
        with Image.open(io.BytesIO(packed)) as image:
            check_image(image, config)
            image.load()
            return image, labels[i]

    source = Source(len(names), load, lambda i: names[i], classes)
    captions = [fact.get("caption") for fact in facts]
    return captioned(from_source(source, config, default_channels=3), captions, names, config)


def _paths(name: str) -> Iterator[Path]:
    if Path(name).is_dir():
        yield from sorted(Path(name).glob("*.tar"))
        return
    found = _RANGE.search(name)
    if found is None:
        yield Path(name)
        return
    first, last = found.groups()
    for number in itertools.islice(range(int(first), int(last) + 1), 100_000):
        yield Path(f"{name[: found.start()]}{number:0{len(first)}d}{name[found.end() :]}")


def _facts(name: str, parts: dict[str, bytes]) -> dict[str, object]:
    """The label and the caption of a sample, as far as there are."""
    facts: dict[str, object] = {}
    try:
        if ".json" in parts:
            described = json.loads(parts[".json"])
            facts = {
                key: described[key] for key in ("label", "caption") if isinstance(described, dict) and key in described
            }
        if ".cls" in parts:
            facts["label"] = int(parts[".cls"])
        if ".txt" in parts:
            facts["caption"] = parts[".txt"].decode("utf-8").strip()
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: what describes it cannot be read: {error}") from error
    return facts


def _labels(data: str, names: list[str], given: list[object]) -> tuple[list[int], list[str]]:
    """Classes by number, or by name where they are words."""
    if all(label is None for label in given):
        return [0] * len(given), ["all"]
    for name, label in zip(names, given, strict=True):
        if isinstance(label, bool) or not isinstance(label, (int, str)) or (isinstance(label, int) and label < 0):
            raise DataError(f"{name} has the class {label!r}, others have one: expected a number from 0 on, or a word")
    if any(isinstance(label, str) for label in given):
        words = sorted({str(label) for label in given})
        return [words.index(str(label)) for label in given], words
    numbers = [int(label) for label in given if isinstance(label, int)]
    if max(numbers) >= max(len(numbers), 100_000):
        raise DataError(f"{data}: classes go up to {max(numbers)}; number them from 0 on")
    return numbers, [str(number) for number in range(max(numbers) + 1)]
