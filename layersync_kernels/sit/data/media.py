"""Folders of sounds, films or motions: what is in them, and reading all of it with what is broken named."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ...errors import DataError
from ..config.data import DataConfig
from .streaming import DECODE_ERRORS, describe

logger = logging.getLogger(__name__)

V = TypeVar("V")


ROOT = "LAYERSYNC_DATA"
"""Environment variable: a second folder in which named sets are looked for."""


def find_named(config: DataConfig, *names: str) -> Path | None:
    """The first file or folder of these names under `--data-root` or $LAYERSYNC_DATA, or None."""
    folders = [config.data_root, *(Path(folder) for folder in [os.environ.get(ROOT)] if folder)]
    return next((folder / name for folder in folders for name in names if (folder / name).exists()), None)


def first_line(error: Exception) -> str:
    """What an error of somebody else's code says, in a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def holds(name: str, suffixes: Collection[str]) -> bool:
    """Whether a folder of that name has a file of these kinds in it, or in a sub-folder: suffixes in lower case."""
    if not os.path.isdir(name):  # Path.is_dir raises on names too long
        return False
    return any(Path(file).suffix.lower() in suffixes for _, _, files in os.walk(name) for file in files)


def class_files(folder: Path, suffixes: Collection[str]) -> tuple[list[tuple[Path, int]], list[str]]:
    """The files of these kinds in order of their names, each with its class, and the names of the classes.

    A sub-folder is a class, with all that is below it. Where there are none, all files are of one.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and holds(str(entry), suffixes))
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
        first = "; ".join(f"{name}: {reason}" for name, reason in list(broken.items())[:3])
        raise DataError(f"none of the {len(broken)} {what} can be read ({first}); check the files")
    for name, reason in broken.items():
        logger.warning("skipped broken file %s (%s)", name, reason)
    if broken:
        logger.warning("%d of %d %s are broken and were skipped", len(broken), len(names), what)
    return good, broken
