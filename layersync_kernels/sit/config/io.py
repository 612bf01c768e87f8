"""JSON in files, checked against a dataclass as it is read: settings here, counters and records where they belong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from ...errors import ConfigError
from .loss import ScheduleConfig
from .run import TrainConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


T = TypeVar("T")
D = TypeVar("D", bound="DataclassInstance")


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
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    try:
        return build(kind, values)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_json(text: bytes, *, nan: bool = False) -> Any:
    """JSON values from UTF-8.

    Args:
        text: of a file.
        nan: whether NaN may stand for a number, which it does not in JSON.

    Raises:
        ValueError: it is none; also for nesting and numbers beyond what Python reads.
    """

    def constant(name: str) -> float:
        if name == "NaN" and not nan:
            raise ValueError("NaN is no number")
        return float(name)

    try:
        return json.loads(text.decode("utf-8"), parse_constant=constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def build(kind: type[T], values: Any, where: str = "", *, others: Any = None) -> T:
    """A dataclass from plain JSON values, checked against its annotations; its ``__post_init__`` checks ranges.

    Args:
        kind: the dataclass. Fields: int (of 64 bits), float, str, bool, Path, Any, Literal, X | None, dataclasses;
            dictionaries by string and tuples of those.
        values: as `parse_json` gives them.
        where: they stand, for messages.
        others: annotation of values under other names, which are checked and left out; None refuses them.

    Raises:
        ValueError: an unknown or missing name, a value of another type; names it.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'it '}expected an object of settings, found {_shown(values)}")
    hints = typing.get_type_hints(kind)
    values = _grouped(hints, values)
    unknown = sorted(set(values) - set(hints))
    if unknown and others is None:
        raise ValueError(
            f"{where}unknown settings {_shown(unknown)}, as a newer version of layersync_kernels may write them: "
            f"install that one; known: {sorted(hints)}"
        )
    for name in unknown:
        convert(others, values[name], f"{where}{name}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    missing = [f.name for f in fields if f.name not in values and not _has_default(f)]
    if missing:
        raise ValueError(f"{where}missing {missing}")
    converted = {name: convert(hints[name], values[name], f"{where}{name}") for name in hints if name in values}
    try:
        return kind(**converted)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def read_overlay(path: Path, default: D) -> D:
    """Settings in a YAML or JSON file over others: it names only what differs.

    Args:
        path: of the file. Settings stand in their groups, as ``config.json`` of a run has them, or outside of them by
            the names of their flags.
        default: the other settings.

    Raises:
        ConfigError: no such file, neither YAML nor JSON, an unknown setting or one of several groups, a value of the
            wrong type; names the file.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # a SafeLoader
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"cannot read the config {path}: {' '.join(str(error).split())}") from error
    try:
        return overlay(default, {} if values is None else values)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


class _UniqueKeys(yaml.SafeLoader):
    """A SafeLoader that refuses what is set twice, of which PyYAML takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if doubled := {str(key) for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{', '.join(sorted(doubled))} is set twice")
        return super().construct_mapping(node, deep)


def overlay(default: D, values: Any, where: str = "") -> D:
    """Settings with some of them replaced, see `read_overlay`; raises ValueError."""
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'it '}expected settings by name, found {_shown(values)}")
    hints = typing.get_type_hints(type(default))
    changes: dict[str, Any] = {}
    for given, value in _grouped(hints, {str(name): value for name, value in values.items()}, partial=True).items():
        name = given.replace("-", "_")
        own = getattr(default, name, None) if name in hints else None
        if dataclasses.is_dataclass(own) and not isinstance(own, type):
            changes[name] = overlay(changes.get(name, own), value, f"{where}{name}.")
        elif name in hints:
            changes[name] = convert(hints[name], _number(hints[name], value), f"{where}{name}")
        else:
            groups = [f.name for f in dataclasses.fields(default) if _knows(getattr(default, f.name), name)]
            if len(groups) != 1:
                found = f"stands in several groups, {', '.join(groups)}: name one" if groups else "is no setting"
                raise ValueError(f"{where}{given} {found}")
            changes[groups[0]] = overlay(changes.get(groups[0], getattr(default, groups[0])), {name: value}, where)
    return dataclasses.replace(default, **changes)


def _knows(group: Any, name: str) -> bool:
    if not dataclasses.is_dataclass(group):
        return False
    return any(f.name == name or _knows(getattr(group, f.name), name) for f in dataclasses.fields(group))


def _number(hint: Any, value: Any) -> Any:
    """1e-4 is a string in YAML 1.1, which asks for a point; lists may hold such numbers too."""
    if isinstance(value, list):
        return [_number(hint, item) for item in value]
    if isinstance(value, str) and float in {hint, *typing.get_args(hint)}:
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _shown(value: Any) -> str:
    """A value for a message, which a file must not be able to fill the terminal with."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _grouped(hints: dict[str, Any], values: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """Values in groups, where they are those of an earlier version: settings of a schedule stood one level higher.

    Those of `when` had no prefix there, those of `align_when` "align_".
    """
    for group, hint in hints.items():
        if isinstance(hint, type) and issubclass(hint, ScheduleConfig) and group not in values and not partial:
            flat = {group.removesuffix("when") + f.name: f.name for f in dataclasses.fields(hint)}
            schedule = {flat[name]: value for name, value in values.items() if name in flat}
            values = {name: value for name, value in values.items() if name not in flat} | {group: schedule}
    return values


def convert(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as what an annotation says, see `build`; raises ValueError where it is something else."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{where}.")  # type: ignore[arg-type]
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        others = [argument for argument in arguments if argument is not type(None)]
        for argument in others[:-1]:
            with contextlib.suppress(ValueError):
                return convert(argument, value, where)
        return convert(others[-1], value, where)
    if origin is Literal:
        if any(type(value) is type(a) and value == a for a in arguments):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            each = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
            if len(each) == len(value):
                return tuple(convert(h, v, where) for h, v in zip(each, value, strict=True))
    elif origin is dict:
        if isinstance(value, dict):
            return {name: convert(arguments[1], v, f"{where}.{name}") for name, v in value.items()}
    elif hint is Path:
        if isinstance(value, str) and "\0" not in value:
            return Path(value)
    elif hint is float:
        if isinstance(value, float) or (type(value) is int and -(2**63) <= value < 2**63):
            return float(value)
    elif type(value) is hint and (hint is not int or -(2**63) <= value < 2**63):
        return value
    raise ValueError(f"{where} is {_shown(value)}; expected {getattr(hint, '__name__', hint)}")
