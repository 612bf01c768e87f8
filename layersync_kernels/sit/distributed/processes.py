"""The processes of a run, as torchrun starts them, and what they tell each other."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import ConfigError, ProcessLost, UserError, first_line
from ..console import console
from ..device import resolve_device
from .watchdog import STACKS, Watchdog

logger = logging.getLogger(__name__)

_SECONDS_FOR_FIRST = 5
"""That a process waits for the first one to say the same as it."""

_SECONDS_BETWEEN_LOOKS = 0.02
"""At what the other processes have written, while they start."""


@dataclass(frozen=True)
class Processes:
    """One of the processes of a run, all of which call the same methods in the same order. Alone, they do nothing.

    Attributes:
        rank: which one.
        world: how many there are.
        local_world: how many of them are on this machine.
        group: what they talk over; None: that of all of them.
        watchdog: that says where this one hangs.
    """

    rank: int = 0
    world: int = 1
    local_world: int = 1
    group: dist.ProcessGroup | None = None
    watchdog: Watchdog | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def apart(self) -> Processes:
        """The same ones over a connection of their own, for a thread that talks while this one does."""
        if self.world == 1:
            return self
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return dataclasses.replace(self, group=group)

    def come_on(self) -> None:
        """Says that this one does not hang: it begins to train, or has ended a step."""
        if self.watchdog is not None:
            self.watchdog.restart()

    def largest(self, *values: float) -> tuple[float, ...]:
        """The largest of what each of them gives, value by value; the hosts wait for each other, devices do not."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tuple(tensor.tolist())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of what each of them gives, in place; on the tensor's device."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of what each of them gives, in place; on the tensor's device."""
        return self.sum(tensor).div_(self.world) if self.world > 1 else tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """What each of them gives (N, ...), of one shape, one after the other: (N · world, ...); on its device."""
        if self.world == 1:
            return tensor
        everything = tensor.new_empty((self.world * len(tensor), *tensor.shape[1:]))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.14 on
        gather(everything, tensor.contiguous(), group=self.group)
        return everything

    def text(self, text: str, source: int = 0) -> str:
        """What the one of rank `source` gives."""
        if self.world == 1:
            return text
        given = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = torch.tensor([len(given)])
        dist.broadcast(length, source, group=self.group)
        content = given if self.rank == source else torch.empty(int(length), dtype=torch.uint8)
        if int(length):
            dist.broadcast(content, source, group=self.group)
        return bytes(content.tolist()).decode()

    def texts(self, text: str) -> list[str]:
        """What each of them gives, by rank."""
        return [self.text(text, source) for source in range(self.world)]

    def by_first(self, function: Callable[[], str]) -> str:
        """What a function gives that the first process alone calls.

        Raises:
            UserError: it raised one; all processes raise it, of the same type.
        """
        if self.world == 1:
            return function()
        result, failed = "", ""
        error: UserError | None = None
        if self.first:
            try:
                result = function()
            except UserError as raised:
                error, failed = raised, f"{type(raised).__name__}\n{raised}"
        failed = self.text(failed)
        if not failed:
            return self.text(result)
        if error is not None:
            raise error
        name, _, message = failed.partition("\n")
        kinds = {kind.__name__: kind for kind in _kinds(UserError)}
        raise kinds.get(name, UserError)(message)


ALONE = Processes()
"""A single process."""


def _kinds(kind: type[UserError]) -> Iterator[type[UserError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


def _launched() -> tuple[int, int, int, int]:
    """What torchrun says: rank and number of the processes, and both on this machine; (0, 1, 0, 1) without it.

    Raises:
        ConfigError: WORLD_SIZE is not 1, and another variable is missing or no number.
    """
    if (os.environ.get("WORLD_SIZE") or "1") == "1":
        return 0, 1, 0, 1
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    values = {name: os.environ.get(name, "") for name in names}
    if wrong := next((name for name in names if not values[name].isdecimal()), None):
        raise ConfigError(
            f"WORLD_SIZE is {values['WORLD_SIZE']}, and {wrong} is {values[wrong] or 'not set'}; start several "
            "processes with torchrun, which sets both (torchrun --nproc-per-node 8 -m layersync_kernels train ...), or "
            "one with WORLD_SIZE unset"
        )
    rank, world, local_rank, local_world, _ = map(int, values.values())
    return rank, world, local_rank, local_world


def restarted() -> bool:
    """Whether torchrun has started these processes again, after an attempt of the same command that failed."""
    return (os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0") != "0"


@contextlib.contextmanager
def joined(device: str, *, timeout: float, out: Path | None = None) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that torchrun has started, connected until the block ends, and the device of this one.

    Gloo connects hosts and, where there are GPUs, NCCL these. Messages and progress are those of the first process.

    Args:
        device: as `resolve_device` has it; several processes on GPUs take one each.
        timeout: seconds that a process waits for the others, before it gives up.
        out: folder of a run that trains, in which processes that hang or wait for those say where, see `Watchdog`.

    Raises:
        ConfigError: more processes than GPUs, a single GPU named for all, variables that contradict each other.
        ProcessLost: another process ended or did not answer.
        UserError: as raised in the block. Where all processes raise the same, the first one alone does, and the others
            end with exit code 1.
    """
    rank, world, local_rank, local_world = _launched()
    if world == 1:
        yield ALONE, resolve_device(device)
        return
    if rank:
        console.quiet = True
        logging.getLogger("layersync_kernels").setLevel(logging.ERROR)
    wait = datetime.timedelta(seconds=timeout)
    unreachable = f"process {rank} of {world} cannot reach the others"
    try:
        shared, _, _ = next(iter(dist.rendezvous("env://", rank, world, timeout=wait)))
        store = dist.PrefixStore(agree_on_attempt(shared, rank, world, wait), shared)
    except (RuntimeError, ValueError) as error:
        raise ProcessLost(f"{unreachable}: {_short(error)}") from error
    with _said_once(store, rank):
        own = _own_device(device, local_rank, local_world)
    try:
        backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise ProcessLost(f"{unreachable}: {_short(error)}") from error
    watchdog = None if out is None else Watchdog(out / STACKS / f"rank-{rank}.txt", timeout)
    try:
        with _said_once(store, rank):
            yield Processes(rank, world, local_world, watchdog=watchdog), own
    except UserError:
        raise
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        where = ""
        if watchdog is not None and watchdog.written:
            where = f"; {watchdog.path} shows the lines at which it waited, the files beside it those of the others"
        raise ProcessLost(
            f"process {rank} of {world} stops, as another one has ended or has not answered for {timeout:g} s; its own "
            f"message says why ({_short(error)}){where}"
        ) from error
    finally:
        if watchdog is not None:
            watchdog.close()
        dist.destroy_process_group()


@contextlib.contextmanager
def _said_once(store: dist.Store, rank: int) -> Iterator[None]:
    """Around what may fail: where the first process raises the same UserError, the others end with exit code 1."""
    try:
        yield
    except UserError as error:
        store.set(f"failed/{rank}", str(error))
        if rank and _first_says(store, str(error)):
            raise SystemExit(1) from None
        raise


@contextlib.contextmanager
def before_joined() -> Iterator[None]:
    """Around what fails in all processes of a machine alike, before they can tell each other, such as reading flags.

    The first one of the machine says why. torchrun ends the others with it; they speak where it has not.
    """
    if _launched()[2] == 0:
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except (UserError, SystemExit):
        time.sleep(_SECONDS_FOR_FIRST)
        sys.stderr.write(said.getvalue())
        raise


def agree_on_attempt(store: dist.Store, rank: int, world: int, wait: datetime.timedelta) -> str:
    """A name that these processes have in common, and no earlier ones that used the same store.

    torchrun keeps its store when it starts processes again, and with it the addresses of those that have ended, which
    gloo would wait for. Its count of restarts is no such name: it is each node's own.

    Raises:
        RuntimeError: the others did not come in time.
    """
    own = uuid.uuid4().hex
    store.set(f"arrived/{rank}", own)
    others = [f"arrived/{other}" for other in range(1, world)]
    end = time.monotonic() + wait.total_seconds()
    while time.monotonic() < end:
        if rank == 0:
            if store.check(others):
                store.set("attempt", " ".join([own, *(name.decode() for name in store.multi_get(others))]))
            if store.add(f"{own}/joined", 0) == world - 1:
                return own
        elif store.check(["attempt"]):
            attempt, *arrived = store.get("attempt").decode().split()
            if own in arrived:
                store.add(f"{attempt}/joined", 1)
                return attempt
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    raise RuntimeError(f"not all of {world} processes were there within {wait.total_seconds():g} s")


def _own_device(name: str, local_rank: int, local_world: int) -> torch.device:
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ConfigError(
            f"--device {name}: {local_world} processes of this machine would share it; give cuda, or auto"
        )
    if local_world > torch.cuda.device_count():
        raise ConfigError(
            f"{local_world} processes on this machine, which has {torch.cuda.device_count()} GPUs; start torchrun with "
            f"--nproc-per-node {torch.cuda.device_count()}"
        )
    if not dist.is_nccl_available():
        raise ConfigError(
            f"--device {name}: this torch has no NCCL, by which GPUs are connected; install one that has, or start one "
            "process, or several with --device cpu"
        )
    own = torch.device("cuda", local_rank)
    torch.cuda.set_device(own)
    return own


def _first_says(store: dist.Store, message: str) -> bool:
    """Whether the first process fails for the same reason, within some seconds."""
    try:
        store.wait(["failed/0"], datetime.timedelta(seconds=_SECONDS_FOR_FIRST))
        return bool(store.get("failed/0").decode() == message)
    except RuntimeError:  # DistStoreError is one: it does not, or is gone
        return False


def _is_of_connection(error: RuntimeError) -> bool:
    """Whether it comes from a process group: NCCL's errors have a type, gloo's a place in its sources."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def _short(error: Exception) -> str:
    """Gloo's message without the place in its sources before it, and the advice behind it."""
    return re.sub(r"^.*?\[[^]]*/gloo/[^]]*\] ", "", first_line(error)).partition(". ")[0]
