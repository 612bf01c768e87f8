"""Where the records of a run go beside ``metrics.jsonl``: TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import first_line
from ..config.run import TrainConfig
from ..extras import optional_module

logger = logging.getLogger(__name__)

_SECONDS_TO_UPLOAD = 300.0
"""That the end of a run waits for Weights & Biases; what is left by then stays on the disk."""


@contextlib.contextmanager
def surviving_full_disk(what: str) -> Iterator[None]:
    """Logs an OSError instead of raising it: training outlives a picture or a log line that cannot be written."""
    try:
        yield
    except OSError as error:
        logger.warning("cannot write %s: %s; training goes on", what, error)


class Tracker(ABC):
    """Takes records. Whatever becomes of them, training goes on."""

    @abstractmethod
    def write(self, values: Mapping[str, float], step: int) -> None:
        """Adds the numbers of a record, by name."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Ends it; `failed`: whether by an error of the run."""


class TensorBoard(Tracker):
    """Events in the folder ``tensorboard`` of a run.

    Args:
        run_dir: folder of the run.
        step: where the run goes on; TensorBoard leaves out what was written beyond it.

    Raises:
        ImportError: it is not installed.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: SummaryWriter | None = None
        with surviving_full_disk("TensorBoard events"):
            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.write`."""
        if self._writer is not None:
            with surviving_full_disk("TensorBoard events"):
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        """See `Tracker.close`."""
        if self._writer is not None:
            with surviving_full_disk("TensorBoard events"):
                self._writer.close()


class WeightsAndBiases(Tracker):
    """A run of a project of Weights & Biases, whose files are in the folder ``wandb`` of the run.

    Its variables say where it goes, ``WANDB_MODE=offline`` that it stays here. It has the id with which the checkpoints
    of the run are marked, so that a run that is resumed goes on in it; what it has already is not written again. What
    fails is said once, and ends it: a network that is gone, a full disk, no API key.

    Args:
        config: the run, which it shows; its `log.wandb` is the project.
        run_dir: folder of the run.
        run_id: what the run's checkpoints are marked with.

    Raises:
        ConfigError: the package is missing.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, run_id: str) -> None:
        wandb = wandb_module()
        self._run: Any = None
        with self._surviving():
            self._run = wandb.init(
                project=config.log.wandb,
                id=run_id,
                name=run_dir.name,
                dir=run_dir,
                config=json.loads(json.dumps(dataclasses.asdict(config), default=str)),
                allow_val_change=True,  # by a resume with other settings
                resume="allow",
                settings=wandb.Settings(console="off", finish_timeout=_SECONDS_TO_UPLOAD),
            )

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the network, the server, the disk
            self._run = None
            logger.warning("Weights & Biases: %s; training goes on without it", first_line(error))

    def write(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.write`."""
        with self._surviving():
            if self._run is not None and step >= self._run.step:
                self._run.log(dict(values), step=step, commit=True)

    def close(self, *, failed: bool) -> None:
        """See `Tracker.close`."""
        with self._surviving():
            if self._run is not None:
                self._run.finish(exit_code=int(failed))


def wandb_module() -> Any:
    """The package of Weights & Biases.

    Raises:
        ConfigError: it is missing.
    """
    return optional_module("wandb", "--wandb", "layersync_kernels[wandb]")


def open_trackers(config: TrainConfig, run_dir: Path | None, *, step: int, run_id: str) -> list[Tracker]:
    """Those that `config.log` asks for; none without a folder.

    Args:
        config: the run.
        run_dir: its folder.
        step: where it goes on.
        run_id: what its checkpoints are marked with.

    Raises:
        ConfigError: a package is missing that was asked for.
    """
    trackers: list[Tracker] = []
    if run_dir is not None and config.log.tensorboard:
        try:
            trackers.append(TensorBoard(run_dir, step))
        except ImportError:
            logger.info("TensorBoard is not installed: no events are written (pip install tensorboard)")
    if run_dir is not None and config.log.wandb is not None:
        trackers.append(WeightsAndBiases(config, run_dir, run_id))
    return trackers
