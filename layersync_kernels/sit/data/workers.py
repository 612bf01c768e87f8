"""Reading by worker processes, ahead of training.

Workers keep no state: each request says which samples it is for, and at which positions of the stream, and torch's
DataLoader hands the answers on in the order of the requests. That is why a run needs no StatefulDataLoader: its
position is all that there is to remember.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import DataError, first_line

T = TypeVar("T")


def read_by_workers(
    read: Callable[[Tensor, Tensor], T], wanted: Iterable[tuple[Tensor, Tensor]], workers: int, prefetch: int
) -> Iterator[T]:
    """What `read` gives for each request, in their order; tensors in it are pinned where there is a GPU.

    Args:
        read: of positions and sample numbers, int64 (b,) both; gives a tuple of tensors, dictionaries and None.
        wanted: the requests.
        workers: processes; 0: this one reads.
        prefetch: requests that a worker works ahead.

    Raises:
        DataError: one that `read` raised, or a process died.
    """
    loader: DataLoader[Any] = DataLoader(
        _Reader(read),
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator(),  # of seeds for workers, which draw nothing; the global one stays as it is
    )
    items = iter(loader)
    try:
        while True:
            try:
                item = next(items)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise DataError(
                    f"a process that reads the data has died ({first_line(error)}): memory ran out (lower --workers "
                    "or --prefetch), or a file was cut off while it was read"
                ) from error
            if isinstance(item, DataError):
                raise item
            yield item
    finally:
        del items  # ends the workers now, where the traceback of an error would keep them


class _Reader(Dataset[Any]):
    def __init__(self, read: Callable[[Tensor, Tensor], Any]) -> None:
        self._read = read

    def __getitem__(self, request: tuple[Tensor, Tensor]) -> Any:
        try:
            return self._read(*request)
        except DataError as error:  # raised by a worker, it would come with a traceback in its message
            return error


def _as_it_is(item: Any) -> Any:
    return item


def _ignore_interrupt(_worker: int) -> None:
    # A worker must not die of the Ctrl-C that asks the trainer to save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
