"""Work for several devices, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any

from ....errors import CheckpointError
from ...console import start_logging

_POLL = 0.5
"""Seconds between two looks at whether to stop."""
_stop: Event | None = None


@dataclass(frozen=True)
class Call:
    """A function of a module, which gets what asks whether to stop as its last argument; False: it was stopped."""

    function: Callable[..., bool]
    arguments: tuple[Any, ...]


def side_by_side(calls: Sequence[Call], stop_asked: Callable[[], int]) -> bool:
    """Runs all calls at the same time; False when one was stopped before its end.

    A request to stop goes to all of them; where one fails, the others are asked to stop, and save what they have.

    Raises:
        CheckpointError: a process died, as one does that the system kills for its memory.
        Exception: what a call raised, the first of them.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(len(calls), mp_context=context, initializer=_start, initargs=(stop,)) as pool:
        futures = [pool.submit(_run, call) for call in calls]
        running: set[Future[bool]] = set(futures)
        while running:
            done, running = wait(running, timeout=_POLL, return_when=FIRST_EXCEPTION)
            if stop_asked() or any(future.exception() for future in done):
                stop.set()
    try:
        finished = [future.result() for future in futures]  # of all: one that was stopped must not hide one that failed
        return all(finished)
    except BrokenProcessPool as error:
        raise CheckpointError(
            "a process of the comparison died, maybe for want of memory; what was saved goes on with --resume"
        ) from error


def _start(stop: Event) -> None:
    global _stop
    _stop = stop
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends Ctrl-C to all; the first process passes it on
        signal.signal(number, signal.SIG_IGN)
    start_logging()


def _run(call: Call) -> bool:
    assert _stop is not None
    return call.function(*call.arguments, _stop.is_set)
