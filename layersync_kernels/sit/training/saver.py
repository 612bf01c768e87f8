"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ...errors import CheckpointError, ProcessLost, UserError
from ..checkpoints.local import save_checkpoint
from ..checkpoints.parts import is_divided
from ..distributed.processes import Processes

logger = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """What a checkpoint is made of, see `save_checkpoint`."""

    run_dir: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    keep: int
    keep_every: int

    def write(self, processes: Processes) -> None:
        """Writes it."""
        run_dir, step, tensors, state, keep, keep_every = self
        save_checkpoint(run_dir, step, tensors, state, keep=keep, keep_every=keep_every, processes=processes)


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
        on_gpu = device.type == "cuda"
        self._options = StagingOptions(
            use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=on_gpu, use_non_blocking_copy=on_gpu
        )
        self._stager: DefaultStager | None = None
        self._thread: threading.Thread | None = None
        self._copied, self._ended = Future[None](), Future[None]()
        self._waited = self._seconds = 0.0
        self._times: dict[str, float] = {}

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the last checkpoint, unless the processes cannot talk to each other any more."""
        if kind is None or (issubclass(kind, UserError) and not issubclass(kind, ProcessLost)):
            self._end_last()
        if self._stager is not None and self._thread is None:
            self._stager.close()
            self._stager = None

    def save(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint, and waits until it is there.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._end_last()
        snapshot.write(self._processes)

    def begin(self, snapshot: Snapshot) -> None:
        """Begins to write a checkpoint; the device has done what was asked of it."""
        self._end_last()
        if self._stager is None:
            self._stager = DefaultStager(self._options)
        self._waited = self._seconds = 0.0
        self._copied, self._ended = Future(), Future()
        # Not an executor's, which Python waits for when it ends: after an error, that may be for ever.
        self._thread = threading.Thread(target=self._run, args=(snapshot, self._stager), name="saver", daemon=True)
        self._thread.start()

    def _run(self, snapshot: Snapshot, stager: DefaultStager) -> None:
        began, failed = time.monotonic(), None
        try:
            tensors = {
                stem: named
                for stem, named in snapshot.tensors.items()
                if self._processes.first or is_divided(named)  # no other process writes what all have
            }
            staged = stager.stage(tensors)
            copies = staged.result() if isinstance(staged, Future) else staged
            self._copied.set_result(None)
            snapshot._replace(tensors=copies).write(self._apart)
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

    def _end_last(self) -> None:
        """Waits for the last checkpoint in the background."""
        self._wait(self._ended)
        try:
            self.check()
        except CheckpointError as error:
            if self._processes.first:
                logger.error("%s", error)
