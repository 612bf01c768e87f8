"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import CheckpointError, ProcessLost, UserError
from ..checkpoints.local import save_checkpoint
from ..distributed.copies import Copies, Named
from ..distributed.parts import is_divided
from ..distributed.processes import Processes

logger = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """What a checkpoint is made of, see `save_checkpoint`."""

    run_dir: Path
    step: int
    tensors: Named
    state: Mapping[str, Any]
    keep: int
    keep_every: int

    def write(self, processes: Processes) -> None:
        """Writes it."""
        save_checkpoint(**self._asdict(), processes=processes)


class Saver:
    """Writes the checkpoints of a run, one at a time.

    In the background, a thread copies the tensors to the host, while forward and backward passes go on that do not
    change them, and then writes the copies. Training waits for it only where it would overtake it: before the optimiser
    changes what has not been copied yet (`copied`), and before the next checkpoint.

    Args:
        processes: of the run, each of which has one of these; in the background they talk over a connection of theirs.
        device: where the tensors are.

    Raises:
        CheckpointError, RuntimeError: as `check` does, where the block of a ``with`` statement ends, or in it.
    """

    def __init__(self, processes: Processes, device: torch.device) -> None:
        self._processes, self._apart = processes, processes.apart()
        self._device = device
        self._thread: threading.Thread | None = None
        self._copied, self._ended = Future[None](), Future[None]()
        self._waited = self._seconds = 0.0
        self._times: dict[str, float] = {}

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the last checkpoint, unless the processes cannot talk to each other any more."""
        if kind is None or (issubclass(kind, UserError) and not issubclass(kind, ProcessLost)):
            self.finish()

    def save(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint, and waits until it is there.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.finish()
        snapshot.write(self._processes)

    def begin(self, snapshot: Snapshot) -> None:
        """Begins to write a checkpoint; the device has done what was asked of it."""
        self.finish()
        self._waited = self._seconds = 0.0
        self._copied, self._ended = Future(), Future()
        # Not an executor's, which Python waits for when it ends: after an error, that may be for ever.
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, Copies(self._device)), name="saver", daemon=True
        )
        self._thread.start()

    def _run(self, snapshot: Snapshot, copies: Copies) -> None:
        began, failed = time.monotonic(), None
        try:
            tensors = {
                stem: named
                for stem, named in snapshot.tensors.items()
                if self._processes.first or is_divided(named)  # no other process writes what all have
            }
            snapshot = snapshot._replace(tensors=copies.make(tensors))
            self._copied.set_result(None)
            snapshot.write(self._apart)
        except BaseException as error:  # a thread has nobody to tell
            failed = error
        self._seconds = time.monotonic() - began
        for future in (self._copied, self._ended):
            if not future.done():
                future.set_exception(failed) if failed else future.set_result(None)

    def copied(self) -> None:
        """Waits until what was to be saved may be changed.

        Raises:
            RuntimeError: it cannot be copied.
        """
        self._wait(self._copied)

    def check(self) -> None:
        """Looks whether the last checkpoint in the background has come to its end.

        Raises:
            CheckpointError: it could not be written.
            RuntimeError: another process has ended.
        """
        if self._thread is not None and self._ended.done():
            self._thread.join()
            self._thread = None
            self._ended.result()
            self._times = {"save_seconds": self._seconds, "save_wait": self._waited}

    def times(self) -> dict[str, float]:
        """How long a checkpoint took that has been written in the background since this was last asked.

        Returns:
            "save_seconds", from its beginning to its end, and "save_wait", those of them that training waited.
        """
        times, self._times = self._times, {}
        return times

    def _wait(self, what: Future[None]) -> None:
        if self._thread is not None and not what.done():
            began = time.monotonic()
            what.exception()
            self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def surviving(self) -> Iterator[None]:
        """Logs a CheckpointError instead of raising it; all processes have the same, and one of them says so."""
        try:
            yield
        except CheckpointError as error:
            if self._processes.first:
                logger.error("%s; training goes on, and tries again at the next checkpoint", error)

    def finish(self) -> None:
        """Waits until the last checkpoint in the background is there, or has failed, which is logged."""
        self._wait(self._ended)
        with self.surviving():
            self.check()
