"""Images in tar files, as WebDataset names them: NAME.jpg beside NAME.cls, NAME.txt or NAME.json.

By tarfile of the standard library, which reads them member by member and needs no package.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from ...errors import DataError, UserError
from ..config.data import DataConfig
from ..config.io import build, parse_json
from .base import SampleSet
from .captions import captioned
from .folders import check_image, from_source
from .media import mostly
from .memory import limit_bytes
from .remote import ShardCache, is_url
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
    the files as training goes, those of a few files at a time, and the rest alone is held. Files behind URLs are read
    by way of the cache, which also keeps a list of what is in each.

    Raises:
        DataError: a file that is missing or no tar, no images in any, a sample without class among others with one, or
            more than the limit in tars that are compressed; a file that cannot be fetched.
    """
    tars = _Tars(limit_bytes(config), ShardCache.of(config))
    for name in _names(config.data):
        with _naming(name):
            tars.add(name)
    tars.hold()
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
        files = list(Counter(place.file for place in images).values())
        # A batch that passes from one window to the next reads of both.
        tars.keep_open(2 * window_of(files, config.shuffle_shards))
    return captioned(from_source(source, config, default_channels=3, files=files), captions, names, config)


class _Place(NamedTuple):
    file: str
    offset: int
    size: int


class _Tars:
    """What tar files hold.

    Args:
        limit: bytes of images that are held in memory.
        cache: for files behind URLs.

    Attributes:
        images: places of the images of each sample, by suffix.
        described: what else there is of a sample, by suffix.
        held: what is at these places; None: it is more than the limit.
    """

    def __init__(self, limit: float, cache: ShardCache) -> None:
        self.images: dict[str, dict[str, _Place]] = {}
        self.described: dict[str, dict[str, bytes]] = {}
        self.held: dict[_Place, bytes] | None = None
        self._limit, self._cache = limit, cache
        self._sizes: dict[str, int] = {}
        self._compressed: list[str] = []
        self.keep_open(1)

    def keep_open(self, limit: int) -> None:
        """Of the files that are read from later, the last so many stay open."""
        self._file = functools.lru_cache(maxsize=limit)(self._open)

    def _open(self, name: str) -> BinaryIO:
        file = self._cache.open(name, lambda path: path.open("rb"))
        read_ahead(file)
        return file

    def add(self, name: str) -> None:
        """Goes through a file once, or through the list of what is in it."""
        listed = functools.partial(_listed, name)
        found = build(_Listed, parse_json(self._cache.note(name, listed) if is_url(name) else listed(Path(name))))
        if found.compressed:
            self._compressed.append(name)
        for path, offset, size, text in found.members:
            stem, suffix = _split(path)
            key = f"{name}:{stem}"
            if text is not None:
                self.described.setdefault(key, {})[suffix] = text.encode("latin-1")
                continue
            self.images.setdefault(key, {})[suffix] = _Place(name, offset, size)
            self._sizes[name] = self._sizes.get(name, 0) + size

    def hold(self) -> None:
        """Reads all images, if they are within the limit.

        Raises:
            DataError: they are not, and lie in tars that are compressed; one cannot be read.
        """
        if sum(self._sizes.values()) > self._limit:
            if self._compressed:
                raise DataError(f"{self._compressed[0]} is compressed, and more than --memory-limit-gb; unpack it")
            return
        held: dict[_Place, bytes] = {}
        for name in self._compressed:
            with _naming(name):
                held |= self._cache.open(name, functools.partial(_images, name))
        places = [place for own in self.images.values() for place in own.values() if place not in held]
        self.held = held | {place: self.read(place) for place in places}
        self.keep_open(0)

    def read(self, place: _Place) -> bytes:
        """What is at a place.

        Raises:
            DataError: the file is no longer what it was, or cannot be fetched.
        """
        if self.held is not None:
            return self.held[place]
        try:
            # Not at a position of the file, which threads and the processes of workers share.
            content = os.pread(self._file(place.file).fileno(), place.size, place.offset)
        except OSError as error:
            raise DataError(f"cannot read {place.file}: {error}; is it still there?") from error
        if len(content) < place.size:
            raise DataError(f"{place.file} ends before byte {place.offset + place.size}; was it written anew?")
        return content


@dataclass(frozen=True)
class _Listed:
    """What is in a tar: path, offset and size of each image; of what describes one the bytes too, as Latin-1."""

    compressed: bool
    members: tuple[tuple[str, int, int, str | None], ...]


def _listed(name: str, path: Path) -> bytes:
    """`_Listed` of a tar of that name, as JSON."""
    members: list[tuple[str, int, int, str | None]] = []
    with tarfile.open(path) as archive:
        for member in archive:
            _, suffix = _split(member.name)
            if not member.isfile() or suffix not in IMAGES + DESCRIBED:
                continue
            text = None
            if suffix in DESCRIBED:
                if member.size > MAX_DESCRIBED:
                    raise DataError(f"{name}: {member.name} has {member.size} bytes; expected a class or a caption")
                text = _content(archive, member).decode("latin-1")
            members.append((member.name, member.offset_data, member.size, text))
        compressed = not isinstance(archive.fileobj, io.BufferedReader)
    return json.dumps({"compressed": compressed, "members": members}).encode()


def _images(name: str, path: Path) -> dict[_Place, bytes]:
    """The images in a tar of that name, which may be compressed."""
    with tarfile.open(path) as archive:
        return {
            _Place(name, member.offset_data, member.size): _content(archive, member)
            for member in archive
            if member.isfile() and _split(member.name)[1] in IMAGES
        }


def _split(path: str) -> tuple[str, str]:
    """The name of a sample, which ends before the first dot, and the suffix from there on."""
    suffix = path.rpartition("/")[2].partition(".")[2]
    return path[: len(path) - len(suffix) - 1], f".{suffix.lower()}"


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Around reading a tar: what goes wrong names it."""
    try:
        yield
    except UserError:
        raise
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"cannot read {name}: {error}") from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    assert opened is not None  # of a file
    return opened.read()


def _names(name: str) -> Iterator[str]:
    if Path(name).is_dir():
        yield from map(str, sorted(Path(name).glob("*.tar")))
        return
    found = _RANGE.search(name)
    if found is None:
        yield name
        return
    first, last = found.groups()
    for number in itertools.islice(range(int(first), int(last) + 1), 100_000):
        yield f"{name[: found.start()]}{number:0{len(first)}d}{name[found.end() :]}"


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
