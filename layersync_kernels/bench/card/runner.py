"""Runs stages one after the other, each within a limit and all within a budget, so that a later call can go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from ..engine import DEVICE_LOST
from ..journal import now_path
from .build import ROOT
from .state import LOG, RESULTS, Record, State, only_writer, resume

PASSED, FAILED, UNFINISHED = 0, 1, 3
"""Exit codes: every stage passed or has nothing to run here; one failed; call again to go on."""
_DEATHS = 50  # of the processes of a stage; each one leaves a row that the next passes over


@dataclass(frozen=True)
class Stage:
    """A command.

    Attributes:
        name: of its record in the state.
        command: program and arguments.
        estimate: seconds that it takes.
        environment: variables beside the caller's.
        resumable: it goes on where it was cut short, and after a death of its process.
        missing: why it cannot run here, or None.
        product: a file without which it has to run again, on a machine that does not have it.
    """

    name: str
    command: Sequence[str]
    estimate: float
    environment: Mapping[str, str] = field(default_factory=dict)
    resumable: bool = False
    missing: str | None = None
    product: Path | None = None

    @property
    def limit(self) -> float:
        """Seconds after which it is cut short: twice the estimate, and what a slow start may take."""
        return 15 + 2 * self.estimate


class Runner:
    """One call: holds the clock, the log and the child.

    Args:
        out: folder of results; it is the only thing that a stage may count on in a later call.
        seconds: of all stages together.
        grace: seconds between the polite signal and the others.
        clock: seconds since whenever.
    """

    def __init__(
        self, out: Path, seconds: float, grace: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._out, self._grace, self._clock = out, grace, clock
        self._end = clock() + seconds
        self._stop: int | None = None  # the signal that ends this call

    def run(
        self, stages: Sequence[Stage], identity: Mapping[str, str], *, fresh: bool = False, retry: bool = False
    ) -> int:
        """Run what is left to run.

        Args:
            stages: in order of worth.
            identity: of the results.
            fresh: begin anew; earlier results are put aside.
            retry: repeat stages that failed.

        Returns:
            `PASSED`, `FAILED` or `UNFINISHED`, or 128 + the signal that has ended the call.

        Raises:
            UserError: another call writes to the same folder.
        """
        self._out.mkdir(parents=True, exist_ok=True)
        with only_writer(self._out), self._signals():
            state, said = resume(self._out, identity, fresh=fresh)
            with (self._out / LOG).open("ab") as self._log:
                if said is not None:
                    self._say(said)
                state.write(self._out)
                for stage in stages:
                    record = state.stages.get(stage.name)
                    if self._stop is not None or (record is not None and self._is_over(stage, record, retry)):
                        continue
                    self._attempt(stage, state)
                for stage in stages:  # what is left of the time goes to those whose own was too short
                    record = state.stages.get(stage.name)
                    if self._stop is None and stage.resumable and record is not None and record.status == "cut":
                        self._attempt(stage, state, limited=False)
                return self._report(stages, state)

    def _is_over(self, stage: Stage, record: Record, retry: bool) -> bool:
        if stage.product is not None and not stage.product.exists():
            return False
        return record.status == "passed" or (record.status == "failed" and not retry)

    def _attempt(self, stage: Stage, state: State, limited: bool = True) -> None:
        left = self._end - self._clock()
        record = state.stages.get(stage.name) or Record("cut")
        if stage.missing is not None:
            self._say(f"\n== {stage.name}: missing: {stage.missing}")
            state.stages[stage.name] = Record("missing", reason=stage.missing)
            state.write(self._out)
            return
        if left < (min(30.0, stage.estimate) if stage.resumable else stage.estimate):
            self._say(f"\n== {stage.name}: not begun, {max(left, 0):.0f} s are left")
            return
        limit = min(stage.limit, left) if limited else left
        began = self._clock()
        before, record.status, record.reason = record.seconds, "cut", ""
        record.runs += 1
        state.stages[stage.name] = record
        state.write(self._out)
        self._say(f"\n== {stage.name} (about {stage.estimate:.0f} s, at most {limit:.0f}): {' '.join(stage.command)}")
        for _ in range(_DEATHS):
            code = self._child(stage, began + limit)
            record.seconds = before + self._clock() - began
            if code is None or not stage.resumable or not (code == DEVICE_LOST or code < 0):
                break
            self._say(f"{stage.name}: its process ended with {_meaning(code)}; another one goes on")
        if code is not None:
            record.status = "passed" if code == 0 else "failed"
            record.reason = "" if code == 0 else f"ended with {_meaning(code)}"
        else:
            record.reason = f"cut short after {record.seconds - before:.0f} s"
        state.write(self._out)
        self._say(f"{stage.name}: {record.status} in {record.seconds - before:.0f} s {record.reason}".rstrip())

    def _child(self, stage: Stage, end: float) -> int | None:
        """The exit code; None where it was cut short."""
        try:
            child = subprocess.Popen(
                stage.command,
                env={**os.environ, **stage.environment},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # one signal reaches all that it starts
            )
        except OSError as error:
            self._say(f"{stage.name}: cannot be started: {error}")
            return 127
        assert child.stdout is not None
        reader = threading.Thread(target=self._copy, args=(child.stdout,), daemon=True)
        reader.start()
        cut = False
        while child.poll() is None:
            if self._stop is not None or self._clock() > end:
                cut = True
                self._end_child(child)
                break
            time.sleep(0.05)
        reader.join(timeout=5)  # whatever the child has left behind may hold the pipe
        return None if cut else child.returncode

    def _end_child(self, child: subprocess.Popen[bytes]) -> None:
        """First as Ctrl-C does, after which pytest still says what it has found."""
        for number, patience in ((signal.SIGINT, self._grace), (signal.SIGTERM, 2.0), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            try:
                child.wait(patience)
                break
            except subprocess.TimeoutExpired:
                now_path(self._out / RESULTS).unlink(missing_ok=True)  # its case has not killed it: the clock has
        with contextlib.suppress(ProcessLookupError):  # what the child has left of its group
            os.killpg(child.pid, signal.SIGKILL)

    def _copy(self, stream: BinaryIO) -> None:
        while piece := stream.read1(1 << 16):  # type: ignore[attr-defined]
            self._emit(piece)

    def _say(self, text: str) -> None:
        self._emit(f"{text}\n".encode())

    def _emit(self, piece: bytes) -> None:
        self._log.write(piece)
        self._log.flush()
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(1, piece)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGHUP end the stage that runs, and leave a state to go on with.

        Handlers, not SIG_IGN: a caller in the background ignores SIGINT, and what a handler was set for comes back to
        its default in a child.
        """

        def handle(number: int, frame: FrameType | None) -> None:
            self._stop = number

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _report(self, stages: Sequence[Stage], state: State) -> int:
        statuses = {stage.name: state.stages.get(stage.name, Record("not begun")) for stage in stages}
        self._say("")
        for name, record in statuses.items():
            self._say(f"{name:<28} {record.status:<10} {record.seconds:6.0f} s  {record.reason}".rstrip())
        if self._stop is not None:
            return 128 + self._stop
        found = {record.status for record in statuses.values()}
        if "failed" in found:
            return FAILED
        return UNFINISHED if found & {"cut", "not begun"} else PASSED


def _meaning(code: int) -> str:
    if code == DEVICE_LOST:
        return f"status {code}, the device lost"
    return f"status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
