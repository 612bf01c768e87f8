"""Flags over defaults, and over the settings of a run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from ..checkpoints.local import run_of
from ..config.io import load_config
from ..config.run import CONFIG, OfRun

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C or SIGTERM stopped."""
# Flags without the names of their groups: --lr, not --config.optim.lr.
_FLAT = (tyro.conf.OmitArgPrefixes,)
_RUN_SETTINGS = ("data", "transport", "sampling")
"""What a command about a trained model takes over from its run."""

C = TypeVar("C")
R = TypeVar("R", bound=OfRun)


def parse(kind: type[C], argv: Sequence[str], *, default: C, command: str) -> C:
    """Reads flags over `default`; --help and wrong flags end the process, as is usual."""
    return tyro.cli(kind, args=list(argv), default=default, prog=f"layersync {command}", config=_FLAT)


def peek_out(argv: Sequence[str], default: Path) -> tuple[Path, bool]:
    """--out and --resume, which decide about the defaults of all other flags."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--out", type=Path, default=default)
    peek.add_argument("--resume", action="store_true")
    known, _ = peek.parse_known_args(list(argv))
    return known.out, known.resume


def parse_of_run(kind: type[R], argv: Sequence[str], *, command: str) -> R:
    """Reads the flags of a command about a trained model; the settings of its run are the defaults, below the flags."""
    default = kind(source=tyro.MISSING)
    run = run_of(parse(kind, argv, default=default, command=command).source)
    if run is not None:
        config = load_config(run / CONFIG)
        own = {f.name: getattr(config, f.name) for f in dataclasses.fields(kind) if f.name in _RUN_SETTINGS}
        default = dataclasses.replace(default, **own)
    return parse(kind, argv, default=default, command=command)
