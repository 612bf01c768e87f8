"""The terminal."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler

console = Console(stderr=True)


def start_logging() -> None:
    """Sends the package's messages to the terminal, above the progress bar."""
    logger = logging.getLogger("layersync_kernels")
    if not logger.handlers:
        logger.addHandler(RichHandler(console=console, show_path=False, show_time=False))
        logger.setLevel(logging.INFO)
