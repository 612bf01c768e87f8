"""Arrays of .npz files, which may be damaged or made to do harm."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from ...errors import DataError
from ..config.data import DataConfig
from .memory import check_fits, naming

MAX_HEADER = 2**16
"""Bytes in which an array's header has to end."""
_READ_HEADER = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def array_names(name: str) -> list[str]:
    """The arrays in an .npz file; none where it is none."""
    try:
        with zipfile.ZipFile(name) as archive:
            return [member.removesuffix(".npy") for member in archive.namelist()]
    except (OSError, ValueError, zipfile.BadZipFile):
        return []


def read_arrays(
    path: Path, choose: Callable[[Collection[str]], Sequence[str]], config: DataConfig
) -> dict[str, np.ndarray]:
    """Some arrays of an .npz file, in the order of `choose`.

    The headers of those that are wanted are read first, and their sizes counted against `config.memory_limit_gb`;
    others are not looked at.

    Args:
        path: of the file.
        choose: those that are wanted, of the names that are there; may raise DataError.
        config: its memory limit.

    Raises:
        DataError: it is damaged, holds Python objects, more than the limit, or less than it declares; names the file.
    """
    with naming(path):
        try:
            with zipfile.ZipFile(path) as archive:
                members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
                wanted = {name: members[name] for name in choose(members)}
                declared = [_declared(archive, member) for member in wanted.values()]
                check_fits(" and ".join(what for what, _, _ in declared), sum(size for _, size, _ in declared), config)
                for what, size, there in declared:
                    if size > there:
                        raise DataError(f"{what}, {size} bytes, and holds {there}; it is damaged")
                return {name: _read(archive, member) for name, member in wanted.items()}
        except DataError:
            raise
        except Exception as error:  # on damaged files zipfile, the decompressors and numpy raise anything
            raise DataError(f"cannot be read: {str(error) or type(error).__name__}") from error


def _declared(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[str, int, int]:
    """What the header of an array says, the bytes that it takes by that, and the bytes that the archive says it has."""
    if member.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):  # the others need memory that a file sets
        raise DataError(f"{member.filename} is compressed in a way that NumPy does not write")
    with archive.open(member) as packed:
        file = io.BytesIO(packed.read(MAX_HEADER))
        version = npy.read_magic(file)
        if version not in _READ_HEADER:  # 3.0 is for names of fields beyond Latin-1
            raise DataError(f"{member.filename} has .npy version {version}; expected one of {list(_READ_HEADER)}")
        shape, _, dtype = _READ_HEADER[version](file)
        there = member.file_size - file.tell()
    what = f"{member.filename} declares {dtype} {shape}"
    if dtype.hasobject:
        raise DataError(f"{what}: Python objects, which are never unpickled; expected numbers")
    if any(n < 0 for n in shape):
        raise DataError(f"{what}, which cannot be")
    return what, math.prod(shape) * dtype.itemsize, there


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        array = npy.read_array(file, allow_pickle=False)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
