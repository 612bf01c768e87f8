"""Signals as requests: to stop (Ctrl-C, SIGTERM, a terminal that closes), and to save (SIGUSR1)."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request, to be asked for by calling what this yields.

    That gives the signal's number, or 0.

    A second Ctrl-C or SIGTERM aborts. A second SIGHUP does not: when a terminal closes, its shell and the system
    send one each. Where SIGHUP was ignored before, as under nohup, it stays so. Outside the main thread, where Python
    delivers no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    asked = 0
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]

    def ask(number: int, _frame: FrameType | None) -> None:
        # No lock is taken in here, neither an Event's nor those of logging and the progress bar: the next signal can
        # come in the middle of this, and what is interrupted can hold a lock for which it would wait.
        nonlocal asked
        if asked:
            return
        asked = number
        # Not the handlers from before: shells start background jobs with SIGINT ignored, and then nothing would abort.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step and saving; once more aborts\n".encode())

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def save_signal() -> Iterator[Callable[[], bool]]:
    """Turns SIGUSR1 into a request to save, to be asked for by calling what this yields: once for each that came.

    Outside the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = answered = 0

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came += 1

    def asked() -> bool:
        nonlocal answered
        before, answered = answered, came
        return answered > before

    handler = signal.signal(signal.SIGUSR1, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGUSR1, handler)
