"""The folder of a run or a comparison: whose it is, and how a new one takes the place of an old one.

Whoever writes into a folder holds its lock, a file in it that says who that is. On one machine the lock is `flock`'s,
which the kernel drops with the process, however that ends: a lock file that nobody holds is stale, and is taken over.
What is written in it decides where flock does not reach: other machines that see the folder over a network, whose
processes cannot be asked, and file systems that have no locks. There alone two that start in the same instant can pass.

Not `filelock`, which comes with torch: its native lock does not say who holds it, and which of its versions is there,
and so whether its soft lock knows a stale one, is torch's choice. Two system calls do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, ConfigError
from ..config.io import save_config
from ..config.paths import paths_in
from ..config.run import CONFIG, TrainConfig
from ..files import TEMPORARY, atomic_path, flush

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""Name of the lock file in a folder."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def is_empty(folder: Path) -> bool:
    """Whether nothing is there: no folder, or one with no more than a lock in it."""
    return not folder.exists() or (folder.is_dir() and all(path.name == LOCK for path in folder.iterdir()))


def check_run(run_dir: Path, config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Makes sure that a run may use the folder, and touches nothing.

    Raises:
        ConfigError: it is in use and neither `resume` nor `overwrite` is given, what is there is not a run, or what
            `config` reads lies in a folder that is to be deleted.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    is_run = (run_dir / CONFIG).is_file()
    if resume:
        if not is_run:
            raise ConfigError(f"{run_dir} is not a run to resume: it has no {CONFIG}{_moved_aside(run_dir)}")
    elif not is_empty(run_dir):
        if not is_run:
            raise ConfigError(f"{run_dir} exists and is not a run (it has no {CONFIG}); choose another --out")
        if not overwrite:
            raise ConfigError(f"{run_dir} exists; choose another --out, or --resume or --overwrite it")
        check_sources(config, run_dir)


def check_sources(settings: DataclassInstance, folder: Path) -> None:
    """Makes sure that overwriting a folder deletes nothing that the new run or comparison reads.

    Raises:
        ConfigError: it would; names the flags.
    """
    real = folder.resolve()
    # Where a link in the folder leads, and where a link elsewhere leads to.
    inside = [
        f"{flag} {path}"
        for flag, path in paths_in(settings)
        if any(place.is_relative_to(real) for place in (path.resolve(), path.parent.resolve() / path.name))
    ]
    if inside:
        raise ConfigError(
            f"--overwrite would delete {' and '.join(inside)}, which lies in --out {folder}; move it, or choose "
            "another --out"
        )


def start_run(run_dir: Path, config: TrainConfig, *, overwrite: bool) -> None:
    """Makes the folder of a run that `check_run` has passed, anew if `overwrite`, and writes the config into it.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        if overwrite and not is_empty(run_dir):
            replace_folder(run_dir, lambda folder: save_config(config, folder / CONFIG))
        else:
            with atomic_path(run_dir / CONFIG) as temporary:
                save_config(config, temporary)
    except OSError as error:
        raise CheckpointError(f"cannot write the run {run_dir}: {error}") from error


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Puts a new folder in the place of one, with its lock; an end at any point leaves all of the old or of the new.

    The old one is called ``NAME.old-TIME`` until the new one is in its place, and is deleted then.

    Args:
        folder: what is replaced; a link to it stays.
        write: makes the content of the folder that it is given.

    Raises:
        OSError: it cannot be done; the old folder is in its place.
    """
    folder = folder.resolve()
    new = folder.with_name(f"{TEMPORARY}{folder.name}")
    old = folder.with_name(f"{folder.name}.old-{datetime.now():%Y%m%d-%H%M%S.%f}")
    shutil.rmtree(new, ignore_errors=True)  # of an attempt that was killed
    new.mkdir()
    write(new)
    flush(new)
    folder.rename(old)
    try:
        _move_lock(old, new)
        new.rename(folder)
    except OSError:
        _move_lock(new, old)
        old.rename(folder)
        raise
    flush(folder.parent)
    try:
        shutil.rmtree(old)
    except OSError as error:
        logger.warning("what was in %s before is now in %s and could not be deleted: %s", folder, old, error)


def _move_lock(source: Path, target: Path) -> None:
    if (source / LOCK).exists():
        (source / LOCK).rename(target / LOCK)


def _moved_aside(folder: Path) -> str:
    """What an end in the middle of `replace_folder` has left."""
    left = sorted(folder.parent.glob(f"{folder.name}.old-*"))
    return f"; {left[-1]} is what was to be overwritten" if left else ""


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process, to be entered before anything is written; makes it, and removes it if empty.

    Raises:
        ConfigError: a process uses it, or one on another machine may.
        CheckpointError: the lock cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            descriptor = _take_lock(folder)
        except OSError as error:
            raise CheckpointError(f"cannot write into {folder}: {error}") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if _is_open(folder / LOCK, descriptor):
                    (folder / LOCK).unlink()  # while it is held: who has it open by now finds it gone
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _take_lock(folder: Path) -> int:
    """The descriptor of the lock file, held."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # who had the folder before removes it now
            continue
        try:
            _hold(descriptor, path)
            if _is_open(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed since it was opened


def _hold(descriptor: int, path: Path) -> None:
    """Writes into the lock file who has it, unless somebody else does."""
    locks = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path, _holder(descriptor)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        locks = False
    holder, host = _holder(descriptor), socket.gethostname()
    if holder and holder.get("host") != host:
        raise ConfigError(
            f"{path.parent} is in use by process {holder.get('pid')} on {holder.get('host')}, or was when that ended "
            f"without a chance to say so, which cannot be seen from {host}. If it does not run any more, remove {path}"
        )
    if holder and not locks and _started(holder.get("pid")) == holder.get("started"):
        raise _in_use(path, holder)
    os.ftruncate(descriptor, 0)
    mine = {"host": host, "pid": os.getpid(), "started": _started(os.getpid())}
    os.pwrite(descriptor, json.dumps(mine).encode(), 0)


def _in_use(path: Path, holder: dict[str, Any]) -> ConfigError:
    who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"
    return ConfigError(f"{path.parent} is in use by {who}; stop that one first, or choose another --out")


def _holder(descriptor: int) -> dict[str, Any]:
    """What a lock file says; nothing where its writer has not come to that, or did not end it."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _started(pid: Any) -> str | None:
    """When the process of that number started, in clock ticks since the machine did; None: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_open(path: Path, descriptor: int) -> bool:
    """Whether the file of that name is the one that is open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
