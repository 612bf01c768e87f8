"""`layersync train`."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...errors import ConfigError
from ..checkpoints.local import newest_checkpoint
from ..checkpoints.weights import warn_of_first_weights
from ..config.paths import with_absolute_paths
from ..config.run import CONFIG, StartingPoint, TrainConfig
from ..console import console, start_logging
from ..data.base import write_broken
from ..distributed.processes import Processes, before_joined, joined, restarted
from ..training.folder import check_run, lock_folder, start_run
from ..training.loop import Outcome, Trainer
from ..training.runlog import checkpoint_to_resume
from ..training.terms.base import TaughtTerm
from ..training.terms.layersync import LayerSyncTerm
from ..training.trackers import wandb_module
from .arguments import INTERRUPTED, code_flags, command_line, parse, peek_out, starting_point


@dataclass(frozen=True)
class TrainCommand(StartingPoint):
    """Train a SiT. Everything goes to the folder --out: config, log, checkpoints, sample grids, loss curves.

    Most used: --preset, --data, --image-size, --model, --layersync, --weight, --steps, --max-seconds, --batch-size,
    --lr, --cfg-scale, --out, --resume.
    """

    config: TrainConfig = field(default_factory=TrainConfig)
    out: Path = Path("runs/sit")
    """Folder of the run."""
    resume: bool = False
    """Go on from the newest checkpoint in --out that is not damaged, with its config; flags given now override it."""
    overwrite: bool = False
    """Put the new run in the place of that in --out, which is deleted."""


def train_main(argv: Sequence[str]) -> int:
    """`layersync train`."""
    start_logging()
    with before_joined():
        out, resume = peek_out(argv, TrainCommand.out)
        taken = out / CONFIG if resume and (out / CONFIG).is_file() else None
        default = TrainCommand(config=starting_point(argv, taken=taken))
        command = parse(TrainCommand, argv, default=default, command="train")
    outcome = run_training(command.config, command.out, resume=command.resume, overwrite=command.overwrite)
    # SIGTERM is how a cluster takes its machines back: the run has been saved, and nothing has failed.
    return INTERRUPTED if outcome.ended == "interrupted" and outcome.signal != signal.SIGTERM else 0


def run_training(config: TrainConfig, out: Path, *, resume: bool = False, overwrite: bool = False) -> Outcome:
    """Trains in the folder `out` and says where everything is.

    Where torchrun starts the same command again after a failure, the run goes on.

    Raises:
        UserError: whatever can be put right: settings, data, folders, a full disk, a loss that is not finite.
    """
    config = with_absolute_paths(config)
    with before_joined():
        config.validate()
    if restarted() and (out / CONFIG).is_file():  # by the attempt before
        resume, overwrite = True, False
    with contextlib.ExitStack() as stack:
        processes, device = stack.enter_context(joined(config.device, timeout=config.parallel.timeout, out=out))

        def claim() -> str:
            if config.log.wandb is not None:
                wandb_module()  # missing, it stops all of them before there is a run
            stack.enter_context(lock_folder(out))
            check_run(out, config, resume=resume, overwrite=overwrite)
            return ""

        processes.by_first(claim)
        return _train(config, out, processes, device, resume=resume, overwrite=overwrite)


def _train(
    config: TrainConfig, out: Path, processes: Processes, device: torch.device, *, resume: bool, overwrite: bool
) -> Outcome:
    """In a folder that is locked and may be used so."""
    # The trainer before the run: settings that do not work must neither begin one nor delete one.
    trainer = Trainer(config, processes=processes, device=device, run_dir=out)
    # An attempt may have failed before its first checkpoint; to anybody else, records without one are a loss.
    find = newest_checkpoint if restarted() else checkpoint_to_resume
    if resume and (checkpoint := processes.by_first(lambda: os.fspath(find(out) or ""))):
        trainer.load(Path(checkpoint))
        console.print(f"resuming {out} at step {trainer.steps_done}")
        if trainer.fraction >= 1:
            raise ConfigError(f"{out} is finished at step {trainer.steps_done}; give more --steps or --max-seconds")

    def start() -> str:
        start_run(out, config, overwrite=overwrite)
        if trainer.data.broken:
            write_broken(out, trainer.data.broken)
        return ""

    processes.by_first(start)
    taught = trainer.term(TaughtTerm)  # type: ignore[type-abstract]
    terms = [*([] if trainer.term(LayerSyncTerm) else ["LayerSync off"]), *(t.summary() for t in trainer.state.terms)]
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    shared = "" if processes.world == 1 else f" x {processes.world} processes ({config.parallel.parallel})"
    console.print(
        f"{config.model.model}, {parameters:.1f} M parameters, {len(trainer.data)} samples of {trainer.data.spec}, "
        f"{trainer.device}{shared}, {trainer.autocast_dtype or 'fp32'}; {'; '.join(filter(None, terms))}"
    )
    outcome = trainer.fit()
    if processes.first:
        warn_of_first_weights(config.optim, outcome.step)
    if taught is not None and (share := outcome.metrics.get("teacher_share")) is not None:
        what = "its precomputed features" if config.align.features else "running it"
        console.print(f"the teacher {taught.teacher_name} took {share:.1%} of a step ({what})")
    if outcome.ended == "interrupted":
        again = command_line("train", ["--out", str(out), "--resume"], code_flags(config))
        console.print(f"stopped and saved at step {outcome.step}; go on with: {again}", soft_wrap=True)
    else:
        console.print(f"done: step {outcome.step} after {outcome.seconds:.0f} s; draw with: layersync sample {out}")
    return outcome
