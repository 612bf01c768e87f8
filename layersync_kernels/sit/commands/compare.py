"""`layersync compare`."""

from __future__ import annotations

from collections.abc import Sequence

from ..console import console, start_logging
from ..studies.compare.config import SETTINGS, CompareCommand, CompareConfig
from ..studies.compare.run import compare
from .arguments import INTERRUPTED, code_flags, command_line, parse, peek_out, read_settings, starting_point


def compare_main(argv: Sequence[str]) -> int:
    """`layersync compare`."""
    start_logging()
    out, resume = peek_out(argv, CompareCommand.out)
    if resume and (out / SETTINGS).is_file():
        default = CompareCommand(comparison=read_settings(out / SETTINGS, CompareConfig))
    else:
        # A dozen runs of a minute of two cores each.
        brief = starting_point(argv, steps=2000, max_seconds=60.0)
        default = CompareCommand(comparison=CompareConfig(train=brief))
    command = parse(CompareCommand, argv, default=default, command="compare")
    report = compare(command)
    if report is None:
        again = command_line("compare", ["--out", str(command.out), "--resume"], code_flags(command.comparison))
        console.print(f"stopped and saved; go on with: {again}", soft_wrap=True)
        return INTERRUPTED
    print(report)
    return 0
