"""Where the threads of a process are, for one that hangs or waits for one that does."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

STACKS = "stacks"
"""Name of the folder of stacks in a run's folder."""
_STDERR = 2


class Watchdog:
    """Writes the stacks of all threads of this process when too much time passes between two calls of `restart`.

    A thread of `faulthandler` waits and writes. It is C and needs no GIL, so that it also shows the line of a C call
    that hangs and keeps it. Processes that wait for another one write theirs by the same clock: it is a tenth faster
    than the limit after which they give up, and all files are there when the first of them ends.

    Args:
        path: file for the stacks, to which they are added. It is opened by the first `restart`; before that, and where
            it cannot be written, they go to stderr.
        seconds: limit of those who wait for this process.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self._seconds = path, 0.9 * seconds
        self._file: BinaryIO | None = None
        self._sizes = (0, 0)  # of the file before and behind the line that says whose stacks follow
        self._opened = False
        self._wait()

    def _wait(self) -> None:
        faulthandler.dump_traceback_later(self._seconds, file=self._file or _STDERR)

    def restart(self) -> None:
        """Waits anew."""
        if not self._opened:
            self._opened = True
            self._open()
        self._wait()

    def _open(self) -> None:
        now = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}"
        try:
            self.path.parent.mkdir(exist_ok=True)
            file = self.path.open("ab", buffering=0)
            before = file.tell()
            behind = before + file.write(f"process {os.getpid()} on {socket.gethostname()}, from {now} on\n".encode())
        except OSError as error:
            logger.warning("cannot write %s: %s; stacks of a process that hangs go to stderr", self.path, error)
            return
        self._file, self._sizes = file, (before, behind)

    @property
    def written(self) -> bool:
        """Whether there are stacks in the file."""
        return self._file is not None and os.fstat(self._file.fileno()).st_size > self._sizes[1]

    def close(self) -> None:
        """Ends the waiting, and leaves no file without stacks."""
        faulthandler.cancel_dump_traceback_later()
        if self._file is None:
            return
        with contextlib.suppress(OSError), self._file as file:
            if not self.written:
                file.truncate(self._sizes[0])
                if not self._sizes[0]:
                    self.path.unlink()
                    self.path.parent.rmdir()  # where others have left none either
