"""`layersync compare`."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import ConfigError
from ..console import console, start_logging
from ..studies.compare.command import compare
from ..studies.compare.config import SETTINGS, CompareCommand, CompareConfig
from ..studies.compare.presets import STUDIES
from .arguments import INTERRUPTED, code_flags, command_line, parse, peek, peek_out, read_settings, starting_point


def compare_main(argv: Sequence[str]) -> int:
    """`layersync compare`."""
    start_logging()
    command = parse(CompareCommand, argv, default=CompareCommand(comparison=_defaults(argv)), command="compare")
    report = compare(command)
    if report is None:
        again = command_line("compare", ["--out", str(command.out), "--resume"], code_flags(command.comparison))
        console.print(f"stopped and saved; go on with: {again}", soft_wrap=True)
        return INTERRUPTED
    print(report)
    return 0


def _defaults(argv: Sequence[str]) -> CompareConfig:
    """The settings below the flags: of the comparison that goes on, of --study, or of --preset and --config."""
    out, resume = peek_out(argv, CompareCommand.out)
    if resume and (out / SETTINGS).is_file():
        return read_settings(out / SETTINGS, CompareConfig)
    known = peek(argv, study=None, preset=None, config=None)
    if known.study is None:
        # A dozen runs of a minute of two cores each.
        return CompareConfig(train=starting_point(argv, steps=2000, max_seconds=60.0))
    if known.study not in STUDIES:
        raise ConfigError(f"--study {known.study}: no such study; known: {', '.join(STUDIES)}")
    if known.preset is not None or known.config is not None:
        raise ConfigError("--study has settings of its own: leave --preset and --config out, and give flags")
    return STUDIES[known.study]
