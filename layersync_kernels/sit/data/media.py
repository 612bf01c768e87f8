"""Folders of sounds, films or motions: what is in them, and reading all of it with what is broken named."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ...errors import DataError
from ..config.data import DataConfig
from .streaming import DECODE_ERRORS, all_broken_message, describe

logger = logging.getLogger(__name__)

V = TypeVar("V")


MEDIA = frozenset(
    [
        *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".tar", ".bvh"),
        *(".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"),
    ]
)
"""Files that can be samples."""
LOOKED_AT = 1000
"""Of a folder, to see what it is."""
ROOT = "LAYERSYNC_DATA"
"""Environment variable: a second folder in which named sets are looked for."""


def find_named(config: DataConfig, *names: str) -> Path | None:
    """The first file or folder of these names under `--data-root` or $LAYERSYNC_DATA, or None."""
    folders = [config.data_root, *(Path(folder) for folder in [os.environ.get(ROOT)] if folder)]
    return next((folder / name for folder in folders for name in names if (folder / name).exists()), None)


def holds(name: str, suffixes: Collection[str]) -> bool:
    """Whether a folder of that name has a file of these kinds in it, or in a sub-folder: suffixes in lower case."""
    if not os.path.isdir(name):  # Path.is_dir raises on names too long
        return False
    return any(Path(file).suffix.lower() in suffixes for _, _, files in os.walk(name) for file in files)


def mostly(name: str, suffixes: Collection[str]) -> bool:
    """Whether at least half of the media in a folder of that name, of the first `LOOKED_AT`, are of these kinds."""
    if not os.path.isdir(name):
        return False
    found = (Path(file).suffix.lower() for _, _, files in os.walk(name) for file in files)
    media = list(itertools.islice((suffix for suffix in found if suffix in MEDIA or suffix in suffixes), LOOKED_AT))
    return bool(media) and 2 * sum(suffix in suffixes for suffix in media) >= len(media)


def class_files(folder: Path, suffixes: Collection[str]) -> tuple[list[tuple[Path, int]], list[str]]:
    """The files of these kinds in order of their names, each with its class, and the names of the classes.

    A sub-folder is a class, with all that is below it. Where there are none, all files are of one.
    """
    entries = list(folder.iterdir())
    names = sorted(entry.name for entry in entries if entry.is_dir() and holds(str(entry), suffixes))
    beside = sum(entry.suffix.lower() in suffixes and entry.is_file() for entry in entries)
    if names and beside:
        logger.warning("%s: %d files beside the %d class folders are left out", folder, beside, len(names))
    found = []
    for label, name in enumerate(names or ["."]):
        files = sorted((folder / name).rglob("*") if names else folder.iterdir())
        found += [(file, label) for file in files if file.suffix.lower() in suffixes and file.is_file()]
    return found, names or [folder.resolve().name]


def read_all(
    names: Sequence[str], read: Callable[[int], V], *, what: str, workers: int
) -> tuple[dict[int, V], dict[str, str]]:
    """Reads numbered files by threads.

    Args:
        names: one for each.
        read: gives what is in one; a DataError ends the run, any other error means that the file is broken.
        what: the files are, in the plural, for messages.
        workers: threads.

    Returns:
        what was read, by number in ascending order, and why the others could not be, by name.

    Raises:
        DataError: none could be read, or there are none.
    """

    def attempt(number: int) -> tuple[V | None, str]:
        try:
            return read(number), ""
        except DataError:
            raise
        except DECODE_ERRORS as error:
            return None, describe(error)

    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        results = list(pool.map(attempt, range(len(names))))
    good = {number: value for number, (value, reason) in enumerate(results) if value is not None}
    broken = {names[number]: reason for number, (value, reason) in enumerate(results) if value is None}
    if not good:
        raise DataError(all_broken_message(broken, what))
    for name, reason in broken.items():
        logger.warning("skipped broken file %s (%s)", name, reason)
    if broken:
        logger.warning("%d of %d %s are broken and were skipped", len(broken), len(names), what)
    return good, broken
