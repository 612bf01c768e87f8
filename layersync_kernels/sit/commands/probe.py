"""`layersync probe`."""

from __future__ import annotations

from collections.abc import Sequence

from ..console import start_logging
from ..studies.pair.config import ProbeCommand
from ..studies.pair.run import probe
from .arguments import parse_of_run


def probe_main(argv: Sequence[str]) -> int:
    """`layersync probe`."""
    start_logging()
    print(probe(parse_of_run(ProbeCommand, argv, command="probe")))
    return 0
