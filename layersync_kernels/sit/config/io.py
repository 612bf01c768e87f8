"""Settings in files."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ...errors import ConfigError
from .loss import ScheduleConfig
from .run import TrainConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


T = TypeVar("T")


def save_config(config: DataclassInstance, path: Path) -> None:
    """Writes `config`, a dataclass of settings, as JSON."""
    path.write_text(json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n", encoding="utf-8")


def load_config(path: Path) -> TrainConfig:
    """Reads the config of a run; raises as `load_settings`."""
    return load_settings(path, TrainConfig)


def load_settings(path: Path, kind: type[T]) -> T:
    """Reads what `save_config` wrote of a `kind`.

    Raises:
        ConfigError: no such file, not JSON, an unknown setting or a value of the wrong type; names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    return _build(kind, values, f"{path}: ")


def _build(kind: type[T], values: Any, where: str) -> T:
    """A dataclass from plain JSON values, checked against its annotations."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}expected an object of settings, found {values!r}")
    hints = typing.get_type_hints(kind)
    values = _grouped(hints, values)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{where}unknown settings {unknown}; known: {sorted(hints)}")
    return kind(**{name: _convert(hints[name], value, f"{where}{name}") for name, value in values.items()})


def _grouped(hints: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values in groups, where they are those of an earlier version: settings of a schedule stood one level higher.

    Those of `when` had no prefix there, those of `align_when` "align_".
    """
    for group, hint in hints.items():
        if isinstance(hint, type) and issubclass(hint, ScheduleConfig) and group not in values:
            flat = {group.removesuffix("when") + f.name: f.name for f in dataclasses.fields(hint)}
            schedule = {flat[name]: value for name, value in values.items() if name in flat}
            values = {name: value for name, value in values.items() if name not in flat} | {group: schedule}
    return values


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{where}.")  # type: ignore[arg-type]
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            each = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
            if len(each) == len(value):
                return tuple(_convert(h, v, where) for h, v in zip(each, value, strict=True))
    elif hint is Path:
        if isinstance(value, str):
            return Path(value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    raise ConfigError(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}")
