"""`layersync compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..config.io import load_settings
from ..console import start_logging
from ..studies.compare.config import SETTINGS, CompareCommand, CompareConfig
from ..studies.compare.run import compare
from .arguments import INTERRUPTED, parse, peek_out


def compare_main(argv: Sequence[str]) -> int:
    """`layersync compare`."""
    start_logging()
    default = CompareCommand()
    out, resume = peek_out(argv, default.out)
    if resume and (out / SETTINGS).is_file():
        default = dataclasses.replace(default, comparison=load_settings(out / SETTINGS, CompareConfig))
    report = compare(parse(CompareCommand, argv, default=default, command="compare"))
    if report is None:
        return INTERRUPTED
    print(report)
    return 0
