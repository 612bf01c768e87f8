"""Files and folders that settings name, to be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import flag
from .data import NAMED_SETS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

D = TypeVar("D", bound="DataclassInstance")


def with_absolute_paths(settings: D) -> D:
    """The settings with absolute paths, which mean the same in another working directory; names stay names."""
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[f.name] = with_absolute_paths(value)
        elif (path := _path(settings, f.name, value)) is not None:
            changes[f.name] = type(value)(path.absolute())
    return dataclasses.replace(settings, **changes)


def paths_in(settings: DataclassInstance) -> Iterator[tuple[str, Path]]:
    """Flag and path of each, the folders of torch.hub's teachers included."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from paths_in(value)
        elif (path := _path(settings, f.name, value)) is not None:
            yield flag(f.name), path
        elif isinstance(value, str) and value.startswith("hub/"):
            yield flag(f.name), Path(value.removeprefix("hub/").rpartition(":")[0])


def _is_name(data: str) -> bool:
    return data in NAMED_SETS or data.startswith("torchvision:")


def _path(settings: Any, name: str, value: Any) -> Path | None:
    if name == "data":
        return None if _is_name(value) or not Path(value).exists() else Path(value)
    if name == "data_root" and not _is_name(settings.data):
        return None  # nothing reads it
    return value if isinstance(value, Path) else None
