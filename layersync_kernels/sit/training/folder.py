"""The folder of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...errors import CheckpointError, ConfigError
from ..config.io import save_config
from ..config.run import CONFIG, TrainConfig
from ..files import atomic_path


def check_run(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes sure that a run may use the folder, and touches nothing.

    Raises:
        ConfigError: it is in use and neither `resume` nor `overwrite` is given, or what is there is not a run.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    is_run = (run_dir / CONFIG).is_file()
    if resume:
        if not is_run:
            raise ConfigError(f"{run_dir} is not a run to resume: it has no {CONFIG}")
    elif run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        if not is_run:
            raise ConfigError(f"{run_dir} exists and is not a run (it has no {CONFIG}); choose another --out")
        if not overwrite:
            raise ConfigError(f"{run_dir} exists; choose another --out, or --resume or --overwrite it")


def start_run(run_dir: Path, config: TrainConfig, *, overwrite: bool) -> None:
    """Makes the folder of a run that `check_run` has passed, emptied if `overwrite`, and writes the config into it.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        if overwrite and run_dir.exists():
            shutil.rmtree(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_path(run_dir / CONFIG) as temporary:
            save_config(config, temporary)
    except OSError as error:
        raise CheckpointError(f"cannot write the run {run_dir}: {error}") from error
