"""Files that are there entirely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

TEMPORARY = ".writing-"


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    checksum = hashlib.sha256()
    with path.open("rb") as file:  # hashlib.file_digest is new in Python 3.11
        while chunk := file.read(1 << 20):
            checksum.update(chunk)
    return checksum.hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name to write to; the file replaces `path` when the block ends well."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)  # a full disk may say so only now, and `path` is still what it was
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def add_suffix(stem: Path, suffix: str) -> Path:
    """A stem with ".png" or the like behind its name, which may have dots of its own."""
    return stem.with_name(f"{stem.name}{suffix}")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON values, and paths as strings."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=os.fspath) + "\n", encoding="utf-8")


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = False) -> Path:
    """Writes arrays by name as .npz, and returns where they are."""
    write: Callable[..., None] = np.savez_compressed if compressed else np.savez
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        write(file, **arrays)
    return path


def new_figure(width: float, height: float) -> Figure:
    """An empty figure to draw on, in inches."""
    # Not pyplot: no global state and no display is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_ticks(axis: Axis) -> None:
    """Numbers at an axis as people read them, once all is drawn: no powers of ten, and no offset in a corner."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = axis.get_scale() == "log" and high > 10 * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if decades else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG, and returns where it is."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
