"""What `layersync tune` has measured on this machine, and where it is: the table that backend="auto" follows.

A table is read once, at the first choice on a type of device. One that is not this machine's, or no table at all, is
left aside with a single warning; its format is in docs/tuning.md.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import stat
import sys
import warnings
import zlib
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..runtime import environment, machine
from ..runtime.cache import cache_folder
from . import native, registry

FORMAT = 1
DEVICES = ("cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# By channels. Up to 256 Triton gives a program several rows at a time; above 2048 both Triton and CUDA give a row to a
# whole block of threads, where a warp had it.
_LIMITS = (256, 2048)
CLASSES = ("up to 256", "257 to 2048", "over 2048")
_LARGEST_FILE = 4 << 20
_LARGEST_MARGIN = 1e6
_PACKAGE = __name__.partition(".")[0]
_NAMES = {str(dtype): name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """What a table says of an op, a dtype and a class of widths.

    Attributes:
        choice: the backend or route.
        base: what it was compared with: the rules' choice, or where that fails one that works.
        margin: how many times as fast as that, forward and backward together.
    """

    choice: str
    base: str
    margin: float


class Table(NamedTuple):
    """A table in force.

    Attributes:
        path: where it is.
        date: when it was measured, ISO 8601.
        entries: (public function, dtype, class) → entry.
        digest: of the file.
    """

    path: str
    date: str
    entries: Mapping[tuple[str, str, str], Entry]
    digest: int


class State(NamedTuple):
    """The table of a type of device, or why there is none.

    Attributes:
        table: that is in force, or None.
        reason: why it is, or why none is.
    """

    table: Table | None
    reason: str


class _Unusable(Exception):
    """What is wrong with a table: what was found, and what was expected."""


def width_class(width: int) -> str:
    """The class of a row of `width` channels, one of `CLASSES`."""
    return CLASSES[bisect_left(_LIMITS, width)]


def width_of(name: str) -> int:
    """A width of a class."""
    return (*_LIMITS, _LIMITS[-1] + 1)[CLASSES.index(name)]


def default_path(device: str) -> Path:
    """Where `layersync tune` leaves the table of a type of device, and where "auto" looks for it."""
    return cache_folder() / f"tuning-{device}.json"


def identity(device: str) -> dict[str, str]:
    """What a table has to agree in with the machine and the process that read it."""
    library = native.cuda() if device == "cuda" else native.cpp()
    facts = {
        "device": device,
        "name": machine.device_name(device),
        _PACKAGE: sys.modules[_PACKAGE].__version__,  # of what imports this
        "torch": torch.__version__,
        "triton": machine.version_of("triton"),
        "extension": _checksum(library.path) if library.loaded and library.path else "none",
    }
    if device == "cpu":
        try:
            facts["isa"] = library.facts.cpu_isa() if library.loaded else "none"
        except RuntimeError as error:  # LAYERSYNC_CPU_ISA asks for what there is not
            facts["isa"] = str(error)
    return facts


def _checksum(path: str) -> str:
    with open(path, "rb") as file:
        return f"crc32 {zlib.crc32(file.read()):08x}"


@functools.cache
def state(device: str) -> State:
    """The table that is in force for a type of device. Read at the first call, which warns of one that is unusable."""
    wish = environment.TUNING.get()
    if wish == "off":
        return State(None, f"switched off by {environment.TUNING.name}=off")
    if device not in DEVICES:
        return State(None, f"there are tables for {' and '.join(DEVICES)} only")
    if device == "cuda" and not torch.cuda.is_available():
        return State(None, "no GPU is visible to torch")
    path: Path | str = wish
    try:
        path = default_path(device) if wish == "auto" else Path(wish).expanduser()
        content, digest = _read(path)
        if wish != "auto" and _kind(content) in set(DEVICES) - {device}:
            return State(None, f"{environment.TUNING.name}={wish} is a table for {_kind(content)}")
        table = Table(str(path), *_checked(content, device), digest)
    except FileNotFoundError:
        reason = f"there is no tuning table at {path}; `layersync tune` makes one"
        if wish == "auto":
            return State(None, reason)
    except (_Unusable, OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        reason = f"the tuning table {path} is ignored: {error}; `layersync tune` makes a new one"
    else:
        return State(table, f"measured {table.date}")
    warnings.warn(f"layersync_kernels: {reason} ({environment.TUNING.name}=off: none is looked for)", stacklevel=2)
    return State(None, reason)


def speaks_of(op: str, device: str, dtype: torch.dtype) -> bool:
    """Whether the table in force says anything of a function's calls; see `find`."""
    return any(find(op, device, dtype, width_of(name)) is not None for name in CLASSES)


def find(op: str, device: str, dtype: torch.dtype, width: int) -> tuple[Entry, Table] | None:
    """What the table in force says of a call; None where there is none, or where it says nothing of it.

    Args:
        op: the public function.
        device: type of the tensors' device.
        dtype: the widest dtype among the inputs.
        width: channels of a row.
    """
    table = state(device).table
    if table is None:
        return None
    entry = table.entries.get((op, _NAMES.get(str(dtype), ""), width_class(width)))
    return None if entry is None else (entry, table)


def digest() -> tuple[int, ...]:
    """Identifies all that the choices of "auto" depend on here beyond the rules."""
    tables = [state(device).table for device in DEVICES]
    return tuple(0 if table is None else table.digest for table in tables)


def _read(path: Path) -> tuple[Any, int]:
    """The JSON value of a file and the checksum of its bytes."""

    def without_waiting(name: str, flags: int) -> int:  # as a pipe would
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _Unusable("it is no file")
        data = file.read(_LARGEST_FILE + 1)
    if len(data) > _LARGEST_FILE:
        raise _Unusable(f"it is larger than {_LARGEST_FILE >> 20} MiB")
    try:
        return json.loads(data), zlib.crc32(data)
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"it is no JSON: {error}") from None


def _kind(content: Any) -> Any:
    facts = content.get("machine") if isinstance(content, dict) else None
    found = facts.get("device") if isinstance(facts, dict) else None
    return found if isinstance(found, str) else None


def _checked(content: Any, device: str) -> tuple[str, dict[tuple[str, str, str], Entry]]:
    """The date and the entries of a table, if it is well formed and of this machine."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise _Unusable(f"it is no table of format {FORMAT}, found {_shown(found)}")
    facts = _field(content, "machine", dict)
    for what, here in identity(device).items():
        if facts.get(what) != here:
            raise _Unusable(f"it was measured with {what} {_shown(facts.get(what))}, here is {what} {_shown(here)}")
    date = _field(content, "date", str)
    try:
        date = datetime.datetime.fromisoformat(date).isoformat()
    except ValueError:
        raise _Unusable(f"it is damaged: date is {_shown(date)}") from None
    entries = {}
    for entry in _field(content, "entries", list):
        if not isinstance(entry, dict):
            raise _Unusable(f"it is damaged: an entry is {_shown(entry)}")
        key = (_field(entry, "op", str), _field(entry, "dtype", str), _field(entry, "class", str))
        entries[key] = _entry(key, entry)
    return date, entries


def _entry(key: tuple[str, str, str], fields: dict[str, Any]) -> Entry:
    name, dtype, width = key
    op = next((op for op in registry.ops() if name in op.functions), None)
    if op is None or dtype not in DTYPES or width not in CLASSES:
        raise _Unusable(f"it is damaged: an entry for op {_shown(name)}, dtype {_shown(dtype)}, class {_shown(width)}")
    found = Entry(_field(fields, "choice", str), _field(fields, "base", str), _field(fields, "margin", (int, float)))
    known = ("reference", *registry.FUSED_BACKENDS, "compile", *op.routes)
    for backend in (found.choice, found.base):
        if backend not in known:
            raise _Unusable(f"it is damaged: {name} has no backend {_shown(backend)}, expected {', '.join(known)}")
    if isinstance(found.margin, bool) or not 0 < found.margin < _LARGEST_MARGIN:
        raise _Unusable(f"it is damaged: the margin of {name} is {_shown(found.margin)}")
    return found


def _field(fields: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(fields.get(name), kind):
        raise _Unusable(f"it is damaged: {name} is {_shown(fields.get(name))}")
    return fields[name]


def _shown(value: Any) -> str:
    """What was found, short and printable."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return f"{text[:80]}..." if len(text) > 80 else text
