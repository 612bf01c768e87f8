"""Files behind URLs, by fsspec, and a folder on this machine that keeps the newest of them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ...errors import DataError, first_line
from ..config.data import DataConfig
from ..extras import optional_module
from ..files import TEMPORARY, atomic_path

logger = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds before what failed is tried again."""
_BLOCK = 2**22
_COPY = re.compile(rf"({re.escape(TEMPORARY)}\d+-)?[0-9a-f]{{16}}-.+")
"""Names of copies, of which one may be half there; whatever else the folder holds is left alone."""
T = TypeVar("T")


def is_url(name: str) -> bool:
    """Whether a name is a URL such as s3://bucket/folder."""
    return "://" in name


def read_url(url: str) -> bytes:
    """What a small file holds.

    Raises:
        DataError: it cannot be read; fsspec, or the package that it needs for that kind of URL, is missing.
    """
    files, path = _filesystem(url)
    return _twice(url, lambda: files.cat_file(path))


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path within it; asked for anew each time, for connections outlive no fork."""
    fsspec = optional_module("fsspec", f"--data {url}", "layersync_kernels[remote]")
    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # of a protocol that needs a package, or that nobody knows
        raise DataError(f"cannot open {url}: {first_line(error)}") from error
    return files, path


def _twice(url: str, action: Callable[[], T]) -> T:
    """What an action gives; what fails is tried once more, unless the file is not there."""
    try:
        return action()
    except FileNotFoundError as error:
        raise DataError(f"there is no {url}") from error
    except Exception as error:  # file systems of many packages raise anything
        logger.warning("%s: %s; trying once more", url, first_line(error))
        time.sleep(PAUSE)
    try:
        return action()
    except Exception as error:
        raise DataError(f"cannot fetch {url}, tried twice: {first_line(error)}") from error


class ShardCache:
    """Copies of files behind URLs on a disk of this machine, as many as the limit has room for.

    Files come whole, in one sequential read. Those not used for the longest time go first. Several processes may use
    one folder: each file is fetched by one of them, while the others wait for it; the limit holds for all of them. A
    process that has a file open keeps it when its name goes, and the disk has its bytes until the process closes it.

    Args:
        folder: for the copies.
        limit: bytes that they may take.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit

    @classmethod
    def of(cls, config: DataConfig) -> ShardCache:
        """As the settings say."""
        return cls(config.cache or config.data_root / "cache", config.cache_limit_gb * 2**30)

    def open(self, url: str, opener: Callable[[Path], T]) -> T:
        """What `opener` makes of the local copy of a file, which nobody removes meanwhile; else of the path that it is.

        Raises:
            DataError: the file cannot be fetched, or does not fit into the limit or on the disk.
        """
        if not is_url(url):
            return opener(Path(url))
        files, path = _filesystem(url)
        size = _twice(url, lambda: files.info(path))["size"]
        if not isinstance(size, int):
            raise DataError(f"cannot fetch {url}: the server does not say how large it is")
        local = self.folder / _name_of(files, path, url)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(_lock_of(local)):
                if not local.is_file():
                    self._fetch(files, path, url, local, size)
                os.utime(local, ns=(time.time_ns(),) * 2)  # finer than the clock of the file system
                try:
                    return opener(local)
                except Exception:
                    local.unlink()  # a damaged copy is fetched anew the next time
                    raise
        except OSError as error:
            raise DataError(f"cannot keep {url} in --cache {self.folder}: {error}") from error

    def note(self, url: str, make: Callable[[Path], bytes]) -> bytes:
        """What `make` says of a file behind a URL, for which it is fetched once: that stays in the folder.

        Notes are small, and no part of the limit.

        Raises:
            DataError: as `open` does.
        """
        place = self.folder / f"note-{_name_of(*_filesystem(url), url)}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(_lock_of(place)):
                if not place.is_file():
                    content = self.open(url, make)
                    with atomic_path(place) as temporary:
                        temporary.write_bytes(content)
                return place.read_bytes()
        except OSError as error:
            raise DataError(f"cannot keep notes of {url} in --cache {self.folder}: {error}") from error

    def _fetch(self, files: Any, path: str, url: str, local: Path, size: int) -> None:
        if size > self.limit:
            raise DataError(
                f"{url} has {size / 2**30:.3g} GB, more than --cache-limit-gb {self.limit / 2**30:g}; raise it"
            )

        def copy() -> None:
            with atomic_path(local) as temporary:
                with _locked(self.folder / "room.lock"):
                    self._make_room(size)
                    temporary.touch()
                    os.truncate(temporary, size)  # counts from now on
                with temporary.open("r+b") as target, files.open(path, "rb") as source:
                    while block := source.read(_BLOCK):
                        target.write(block)
                    if (got := target.tell()) != size:
                        raise OSError(f"{got} bytes came; expected {size}")

        _twice(url, copy)

    def _make_room(self, size: int) -> None:
        """Removes the files used longest ago, until one more of that size fits; the caller has the folder's lock."""
        found = []
        for entry in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # one that another process has just finished
                if _COPY.fullmatch(entry.name) and entry.suffix != ".lock":
                    facts = entry.stat()
                    found.append((facts.st_mtime, facts.st_size, entry))
        total = sum(own for _, own, _ in found)
        for _, own, entry in sorted(found):
            if total + size <= self.limit:
                return
            with contextlib.suppress(BlockingIOError), _locked(_lock_of(entry), wait=False):
                entry.unlink(missing_ok=True)
                total -= own


def _name_of(files: Any, path: str, url: str) -> str:
    """What the copy of a file is called: by its URL, and by what changes with what is behind it."""
    version = f"{url} {_twice(url, lambda: files.ukey(path))}"
    return f"{hashlib.sha256(version.encode()).hexdigest()[:16]}-{path.split('/')[-1]}"


def _lock_of(local: Path) -> Path:
    """The lock of a copy, and of a copy that is being made; it stays, for a lock that goes protects nothing."""
    name = local.name
    if name.startswith(TEMPORARY):
        name = name.removeprefix(TEMPORARY).partition("-")[2]
    return local.with_name(f"{name}.lock")


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds a lock between processes.

    Raises:
        BlockingIOError: another process has it, and this one does not wait.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
