"""Flags over defaults, and over the settings of a run."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from ...errors import ConfigError
from ..checkpoints.export import record_of
from ..checkpoints.local import run_of
from ..config import flag
from ..config.data import DataConfig
from ..config.io import load_settings, read_overlay
from ..config.loss import AlignConfig
from ..config.run import CONFIG, OfRun, TrainConfig
from ..data.folders import unpickles
from ..data.user import is_python_path
from ..presets.registry import PRESETS
from ..teachers.networks import runs_code

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

INTERRUPTED = 130
"""Exit code of a command that was stopped before its end; `train`, which saves, ends with 0 after SIGTERM."""
# Flags without the names of their groups: --lr, not --config.optim.lr.
_FLAT = (tyro.conf.OmitArgPrefixes,)
_RUN_SETTINGS = ("data", "transport", "sampling")
"""What a command about a trained model takes over from its run."""

_CODE = {
    "teacher": runs_code,
    "quality_network": runs_code,
    "data": lambda name: unpickles(name) or is_python_path(name),
}
"""Settings by which a name can stand for code, and what tells whether one does. A new one of that kind belongs here."""

C = TypeVar("C")
D = TypeVar("D", bound="DataclassInstance")
R = TypeVar("R", bound=OfRun)


class FromFile(str):
    """The name of code in a file of settings. tyro hands on a default as it is: what a flag gave is of another type."""

    __slots__ = ()


def read_settings(path: Path, kind: type[D]) -> D:
    """Settings in a file, as defaults for `parse`, which lets them run no code; raises as `load_settings`."""
    return _marked(load_settings(path, kind))


def _marked(settings: Any) -> Any:
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            changes[f.name] = _marked(value)
        elif _is_code(f.name, value):
            changes[f.name] = FromFile(value)
    return dataclasses.replace(settings, **changes)


def _is_code(name: str, value: Any) -> bool:
    return value is not None and name in _CODE and _CODE[name](value)


def code_flags(settings: Any) -> dict[str, str]:
    """The flags by which these settings run code, with their values."""
    found: dict[str, str] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if dataclasses.is_dataclass(value):
            runs = not (isinstance(value, AlignConfig) and value.features is not None)  # else the teacher does not run
            found |= code_flags(value) if runs else {}
        elif _is_code(f.name, value):
            found[flag(f.name)] = value
    return found


def parse(kind: type[C], argv: Sequence[str], *, default: C, command: str) -> C:
    """Reads flags over `default`; --help and wrong flags end the process, as is usual.

    Raises:
        ConfigError: a file names code that would run (see `read_settings`), and no flag of this call does.
    """
    settings = tyro.cli(kind, args=list(argv), default=default, prog=f"layersync {command}", config=_FLAT)
    if code := {name: value for name, value in code_flags(settings).items() if isinstance(value, FromFile)}:
        raise ConfigError(
            f"a file of settings names code, {', '.join(code.values())}, and a file must not start any. If you trust "
            f"that code, name it yourself: {command_line(command, argv, code)}"
        )
    return settings


def command_line(command: str, argv: Sequence[str], flags: Mapping[str, str]) -> str:
    """What to type into a shell."""
    return shlex.join(["layersync", command, *argv, *(part for name, value in flags.items() for part in (name, value))])


def starting_point(argv: Sequence[str], *, taken: Path | None = None, **brief: Any) -> TrainConfig:
    """The settings below the flags: of --preset, with those of --config over them.

    Without --preset those of "small"; of "images", which are its data too, where nothing says what to train on.

    Args:
        argv: of the command.
        taken: file of the settings that are taken instead, of a run that goes on.
        brief: settings of the optimiser that take the place of those where --preset is not given.

    Raises:
        ConfigError: an unknown preset; a file that cannot be used; both beside settings that are taken.
    """
    known = peek(argv, preset=None, config=None, data=DataConfig.data)
    if taken is not None:
        if known.preset is not None or known.config is not None:
            raise ConfigError(f"--resume takes the settings of {taken}: leave --preset and --config out")
        return read_settings(taken, TrainConfig)
    if known.preset is not None and known.preset not in PRESETS:
        raise ConfigError(f"--preset {known.preset}: no such preset; known: {', '.join(PRESETS)}")
    if known.preset is not None:
        config = PRESETS[known.preset]
    else:
        images = known.config is None and known.data == DataConfig.data
        config = PRESETS["images" if images else "small"]
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **brief))
    return config if known.config is None else _marked(read_overlay(Path(known.config), config))


def peek(argv: Sequence[str], **defaults: str | None) -> argparse.Namespace:
    """The values of these flags, on which the defaults of the others depend."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_known_args(list(argv))[0]


def peek_out(argv: Sequence[str], default: Path) -> tuple[Path, bool]:
    """--out and --resume, which decide about the defaults of all other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args(list(argv))
    return known.out, known.resume


def parse_of_run(kind: type[R], argv: Sequence[str], *, command: str) -> R:
    """Reads the flags of a command about a trained model; the settings of its run are the defaults, below the flags.

    An exported file or folder has those about sampling.
    """
    default = kind(source=tyro.MISSING)
    source = parse(kind, argv, default=default, command=command).source
    settings: Any = record_of(source)
    if settings is not None:
        names = [name for name in _RUN_SETTINGS if name != "data"]
    elif (run := run_of(source)) is not None:
        settings, names = read_settings(run / CONFIG, TrainConfig), list(_RUN_SETTINGS)
    if settings is not None:
        own = {f.name: getattr(settings, f.name) for f in dataclasses.fields(kind) if f.name in names}
        default = dataclasses.replace(default, **own)
    return parse(kind, argv, default=default, command=command)
