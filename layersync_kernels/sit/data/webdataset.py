"""Images in tar files, as WebDataset names them: NAME.jpg beside NAME.cls, NAME.txt or NAME.json.

By tarfile of the standard library, which reads them member by member and needs no package.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ...errors import DataError
from ..config.data import DataConfig
from .base import SampleSet
from .captions import captioned
from .folders import check_image, from_source
from .media import mostly
from .memory import limit_bytes
from .remote import is_url
from .shards import read_ahead, window_of
from .streaming import Source

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
DESCRIBED = (".cls", ".txt", ".json")
MAX_DESCRIBED = 2**20
"""Bytes of one of these."""
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_webdataset(name: str) -> bool:
    """Whether a name is that of a tar file, several (``{000..009}.tar``), or a folder of such."""
    return name.endswith(".tar") or mostly(name, {".tar"})


def load_webdataset(config: DataConfig) -> SampleSet:
    """Tar files of images; ``.cls`` holds the class, ``.txt`` a caption, ``.json`` either by "label" and "caption".

    What is packed is held in memory. If it is more than `config.memory_limit_gb`, images are read from their places in
    the files as training goes, those of a few files at a time, and the rest alone is held.

    Raises:
        DataError: a file that is missing or no tar, no images in any, a sample without class among others with one, or
            more than the limit in tars that are compressed.
    """
    if is_url(config.data):
        raise DataError(f"{config.data}: tar files are read from folders of this machine; copy or mount them")
    tars = _Tars(limit_bytes(config))
    for path in _paths(config.data):
        try:
            tars.add(path)
        except (OSError, tarfile.TarError, EOFError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
    samples = {key: places for key, places in tars.images.items() if places}
    if not samples:
        raise DataError(f"{config.data} holds no images: expected {', '.join(IMAGES)}")
    names = list(samples)
    images = [next(places[suffix] for suffix in IMAGES if suffix in places) for places in samples.values()]
    facts = [_facts(name, tars.described.get(name, {})) for name in names]
    labels, classes = _labels(config.data, names, [fact.get("label") for fact in facts])

    def load(i: int) -> tuple[Image.Image, int]:
        with Image.open(io.BytesIO(tars.read(images[i]))) as image:
            check_image(image, config)
            image.load()
            return image, labels[i]

    source = Source(len(names), load, lambda i: names[i], classes)
    captions = [fact.get("caption") for fact in facts]
    files: list[int] = []
    if tars.held is None:
        files = list(Counter(place.path for place in images).values())
        tars.recent = deque(maxlen=2 * window_of(files, config.shuffle_shards))
    return captioned(from_source(source, config, default_channels=3, files=files), captions, names, config)


class _Place(NamedTuple):
    path: Path
    offset: int
    size: int


class _Tars:
    """What tar files hold.

    Attributes:
        images: places of the images of each sample, by suffix.
        described: what else there is of a sample, by suffix.
        held: what is at these places; None: it is more than the limit.
        recent: files that have been read ahead.
    """

    def __init__(self, limit: float) -> None:
        self.images: dict[str, dict[str, _Place]] = {}
        self.described: dict[str, dict[str, bytes]] = {}
        self.held: dict[_Place, bytes] | None = {}
        self._limit, self._size = max(limit, 1), 0
        self.recent: deque[Path] = deque(maxlen=1)

    def add(self, path: Path) -> None:
        """Goes through a file once."""
        with tarfile.open(path) as archive:
            for member in archive:
                suffix = member.name.rpartition("/")[2].partition(".")[2]
                if not member.isfile() or not suffix:
                    continue
                key = f"{path}:{member.name[: len(member.name) - len(suffix) - 1]}"
                suffix = f".{suffix.lower()}"
                if suffix in IMAGES:
                    self._size += member.size
                    place = _Place(path, member.offset_data, member.size)
                    self.images.setdefault(key, {})[suffix] = place
                    if self._size > self._limit:
                        self.held = None
                    if self.held is not None:
                        self.held[place] = _content(archive, member)
                    elif not isinstance(archive.fileobj, io.BufferedReader):
                        raise DataError(f"{path} is compressed, and more than --memory-limit-gb; unpack it")
                elif suffix in DESCRIBED:
                    if member.size > MAX_DESCRIBED:
                        raise DataError(f"{path}: {member.name} has {member.size} bytes; expected a class or a caption")
                    self.described.setdefault(key, {})[suffix] = _content(archive, member)

    def read(self, place: _Place) -> bytes:
        """What is at a place.

        Raises:
            DataError: the file is no longer what it was.
        """
        if self.held is not None:
            return self.held[place]
        try:
            with place.path.open("rb") as file:
                if place.path not in self.recent:
                    self.recent.append(place.path)
                    read_ahead(file)
                file.seek(place.offset)
                content = file.read(place.size)
        except OSError as error:
            raise DataError(f"cannot read {place.path}: {error}; is it still there?") from error
        if len(content) < place.size:
            raise DataError(f"{place.path} ends before byte {place.offset + place.size}; was it written anew?")
        return content


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    assert opened is not None  # of a file
    return opened.read()


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
