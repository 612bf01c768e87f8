"""The reference trainer: a SiT on one device or many, with alignment losses as terms of its own."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, TrainingDiverged
from ...runtime.memory import keep_freed_memory
from ..batch import Batch
from ..checkpoints.local import list_checkpoints
from ..checkpoints.state import facts_of
from ..checkpoints.weights import fill_model, load_weights
from ..config.run import SAMPLES, TrainConfig
from ..data.augment import random_mirror
from ..data.base import SampleSet
from ..data.registry import load_data
from ..data.wait import DataClock
from ..device import resolve_device, resolve_precision
from ..diffusion.transport import build_transport
from ..distributed.parallel import Parallel, share_of
from ..distributed.processes import ALONE, Processes
from ..modality.images import Images
from ..modality.latents import Latents
from ..models.embedders import share_draws
from ..models.registry import build_model
from ..sampling.draw import draw, overview_of
from .pace import Pace
from .phases import phase
from .runlog import Meter, RunLog
from .signals import save_signal, stop_signals
from .state import TrainState
from .step import train_step
from .terms import TERMS, build_terms
from .terms.base import LossTerm, Setting, TermBuilder
from .trackers import open_trackers, surviving_full_disk

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=LossTerm)


@dataclass(frozen=True)
class Outcome:
    """How a training ended; `signal`: by which one, or 0."""

    step: int
    ended: Literal["finished", "interrupted"]
    seconds: float
    metrics: dict[str, Any]
    signal: int = 0


class Trainer:
    """A run: its state, its data, and the loop around `train_step`.

    `step` does one optimiser step on a batch; `fit` is the loop around it with logs, pictures and checkpoints.

    Args:
        config: the run.
        data: replaces what `config.data` names.
        processes: that train together; each makes a trainer of the same config, and calls its methods as the others do.
        device: of this one; None: what the config says.
        run_dir: folder made by `start_run`; None writes nothing.
        terms: what builds the terms of the loss beside the flow's own.

    Attributes:
        state: everything that training changes.
        model, ema: of the state.
        transport: computes the flow's own loss.
        meter: means of losses and metrics since it was last read.

    Raises:
        ConfigError, DataError, CheckpointError, TeacherError: as the pieces do.
    """

    state_type: type[TrainState] = TrainState

    def __init__(
        self,
        config: TrainConfig,
        data: SampleSet | None = None,
        *,
        processes: Processes = ALONE,
        device: torch.device | None = None,
        run_dir: Path | None = None,
        terms: Sequence[TermBuilder] = TERMS,
    ) -> None:
        config.validate()
        self.config = config
        self.processes = processes
        self.share = share_of(config.optim, processes)
        self.run_dir = run_dir
        self.device = resolve_device(config.device) if device is None else device
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.autocast_dtype = resolve_precision(config.precision, self.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        self.data = data if data is not None else load_data(config.data, self.device)
        if len(self.data) == 0:
            raise ConfigError("the data set is empty")
        if config.data.flip and not isinstance(self.data.modality, (Images, Latents)):
            raise ConfigError(f"--flip: {config.data.data} holds {self.data.modality.kind}, which has no mirror image")
        self.num_classes = config.model.num_classes or self.data.num_classes
        if self.num_classes < self.data.num_classes:
            raise ConfigError(f"--num-classes {self.num_classes}: the data has {self.data.num_classes}")
        torch.manual_seed(config.seed)
        parallel = Parallel(config.parallel, processes, self.device, dtype=self.autocast_dtype)
        make = functools.partial(build_model, config.model, self.data.spec, self.num_classes, self.data.text_width)
        model = parallel.build(make)
        if config.model.init is not None:
            fill_model(model, load_weights(config.model.init))
        draws = run_dir is not None and config.log.sample_every > 0
        if draws and config.sampling.cfg_scale != 1.0 and not model.guidable:
            raise ConfigError(
                f"--cfg-scale {config.sampling.cfg_scale:g} needs a null label, which --class-dropout above 0 trains; "
                "draw with --cfg-scale 1, or not at all with --sample-every 0"
            )
        share_draws(model.train(), self.share.of_a_pass)
        self.state = self.state_type(
            model,
            build_terms(terms, Setting(config, model, self.data, self.device, processes)),
            config.optim,
            seed=config.seed,
            scaled=self.autocast_dtype == torch.float16,
            parallel=parallel,
        )
        self.model, self.ema = self.state.model, self.state.ema
        self.transport = build_transport(config.transport)
        if config.compile == "on" or (config.compile == "auto" and self.device.type == "cuda"):
            for block in self.model.blocks:
                block.compile()
        self.meter = Meter()
        self._started: float | None = None  # when the time that `state.seconds` does not know yet began
        self._together: float | None = None  # seconds at the end of the last step, the same in all processes
        self._pace = Pace(self.model, self.device, self.autocast_dtype, processes)
        self._unchecked: list[Tensor] = []  # the loss of each step since `check_finite`, still on the device

    def term(self, kind: type[K]) -> K | None:
        """The term of that class, if there is one."""
        return next((term for term in self.state.terms if isinstance(term, kind)), None)

    @property
    def steps_done(self) -> int:
        """Optimiser steps so far."""
        return self.state.steps_done

    @property
    def seconds(self) -> float:
        """Time spent in `fit` and `advance` so far, that of resumed runs included."""
        return self.state.seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    def _stop_clock(self) -> None:
        """Counts the time since `_started` as the state's."""
        self.state.seconds, self._started = self.seconds, None

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]: of its steps, or of its time where that is further."""
        optim = self.config.optim
        fraction = self.steps_done / optim.steps
        if optim.max_seconds is not None:
            seconds = self.seconds if self._together is None else self._together
            fraction = max(fraction, seconds / optim.max_seconds)
        return min(fraction, 1.0)

    def _agree(self, *asked: float) -> tuple[float, ...]:
        """The most that any process asks for; from now on all of them have the same `fraction`."""
        if self.processes.world == 1:
            return asked
        self.processes.come_on()
        *most, self._together = self.processes.largest(*asked, self.seconds)
        return tuple(most)

    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.config.optim.rate(self.steps_done, self.fraction)

    def step(self, batch: Batch) -> None:
        """One optimiser step; nothing is read from the device, except where precomputed features of flipped samples
        are looked up.

        Args:
            batch: on the device but for its index; its size is a multiple of `accumulate`.
        """
        if self.config.data.flip and batch.mirrored is None:  # latents come mirrored
            with phase("data"):
                batch = random_mirror(batch, generator=self.state.generator, share=self.share)
        loss = train_step(
            self.state,
            batch,
            self.transport,
            learning_rate=self.learning_rate(),
            autocast_dtype=self.autocast_dtype,
            meter=self.meter,
            share=self.share,
        )
        self._unchecked.append(loss)
        self._pace.count(batch)

    def check_finite(self) -> None:
        """Reads back whether all losses since the last check, and the weights now, are finite.

        Raises:
            TrainingDiverged: naming the step and the last good checkpoint.
        """
        losses, self._unchecked = self._unchecked, []
        values = torch.stack(losses) if losses else torch.empty(0)
        bad = self.processes.sum(values).isfinite().logical_not().nonzero().flatten().tolist()
        causes = [term.cause(bool(bad)) for term in self.state.terms]
        if bad:
            what = f"the loss was not finite at step {self.steps_done - len(losses) + bad[0] + 1}"
            cause = next(filter(None, causes), "")
            (knows,) = self.processes.largest(self.processes.rank if cause else 0)
            if cause := self.processes.text(cause, int(knows)):
                raise TrainingDiverged(f"{what}: {cause}, or use --precision fp32 or bf16; {self._last_good()}")
        elif any(self.processes.largest(float(not self.state.is_finite()))):
            what = f"the weights were not finite after step {self.steps_done}"
        else:
            return
        raise TrainingDiverged(
            f"{what}; {self._last_good()}. Lower --lr, set --clip-norm 1, or use --precision fp32 or bf16"
        )

    def _last_good(self) -> str:
        self.state.saver.finish()
        checkpoints = list_checkpoints(self.run_dir) if self.run_dir else []
        return f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint had been saved yet"

    def save(self, *, background: bool = False) -> Path:
        """Writes a checkpoint, unless something is not finite, and returns where it is.

        Args:
            background: only begins to, see `TrainState.save`.

        Raises:
            TrainingDiverged: see `check_finite`.
            CheckpointError: it cannot be written; the older ones are intact.
        """
        if self.run_dir is None:
            raise ConfigError("this trainer has no run folder to save to")
        self.check_finite()
        if self._started is not None:
            self._stop_clock()
            self._started = time.monotonic()  # training goes on
        facts = {"meter": self.meter.state_dict(self.processes), "data": facts_of(self.data, self.num_classes)}
        return self.state.save(self.run_dir, facts, self.config.log, background=background)

    def load(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint folder: the same weights, average, optimiser, random numbers, data order and means.

        Raises:
            CheckpointError: it is damaged or belongs to another model; names the file.
        """
        state = self.state.load(checkpoint)
        if state.data.what != self.data.modality:
            raise CheckpointError(
                f"{checkpoint} is of data with another normalisation or form than {self.config.data.data} has now; "
                "resume with the data of the run"
            )
        self.meter.load_state_dict(state.meter, self.device)

    def advance(self, steps: int, stop_asked: Callable[[], float] = lambda: False) -> None:
        """Trains on to step `steps`, or until `stop_asked`, without log and checkpoints, for a caller that measures.

        Raises:
            TrainingDiverged: a loss or weight is not finite.
        """
        batches = self.batches()
        self._started = time.monotonic()
        try:
            while self.steps_done < steps and not any(self._agree(stop_asked())):
                self._step(next(batches), steps)
            self.check_finite()  # waits for the device, too
        finally:
            self._stop_clock()

    def fit(self) -> Outcome:
        """Trains until the steps or the seconds are used up, or until Ctrl-C, SIGTERM or SIGHUP. SIGUSR1 saves.

        Raises:
            TrainingDiverged: a loss or weight is not finite; checkpoints from before stay.
            CheckpointError: the last checkpoint cannot be written; earlier ones that fail only warn.
        """
        config, optim = self.config, self.config.optim
        fraction_before, began = self.fraction, time.monotonic()
        self._started = began
        last_record, recorded_step = time.monotonic(), self.steps_done
        metrics: dict[str, Any] = {}
        batches = DataClock(self.batches())
        written = self.run_dir if self.processes.first else None
        trackers = open_trackers(config, written, step=self.steps_done, run_id=self.state.run)
        rows = config.log.log_every == 1
        log = RunLog(written, step=self.steps_done, steps=optim.steps, trackers=trackers, rows=rows)
        with stop_signals() as stop_asked, save_signal() as save_asked, log, self.state.saver:
            stop, save = self._agree(stop_asked(), save_asked())
            done = self.fraction >= 1
            while not (done or stop):
                with phase("data"):
                    batch = next(batches)
                self._step(batch, optim.steps)
                stop, save = self._agree(stop_asked(), save_asked())
                done = self.fraction >= 1
                with phase("log"):
                    log.advance(self.steps_done, self.fraction)
                    if done or self.steps_done % config.log.log_every == 0:
                        means = self.meter.read(self.processes)
                        now = time.monotonic()
                        steps = self.steps_done - recorded_step
                        metrics = self._record(means, steps, now - last_record, batches.lap())
                        log.record(metrics, seconds_left=self._seconds_left(fraction_before, began))
                        self.check_finite()
                        last_record, recorded_step = time.monotonic(), self.steps_done
                if self.run_dir is None or done:
                    continue
                paused = time.monotonic()
                with self.state.saver.surviving():
                    self.state.saver.check()
                if save or self.steps_done % config.log.checkpoint_every == 0:
                    with self.state.saver.surviving():
                        self.save(background=config.log.save_in_background)
                if config.log.sample_every and self.steps_done % config.log.sample_every == 0:
                    self.draw_samples()
                    log.draw_curves()
                last_record += time.monotonic() - paused  # samples/s count training alone
            if self.run_dir is not None:
                self.save()
                if done and config.log.sample_every:
                    self.draw_samples()
                log.draw_curves()
        self._stop_clock()
        return Outcome(self.steps_done, "finished" if done else "interrupted", self.seconds, metrics, int(stop))

    def batches(self) -> Iterator[Batch]:
        """What `step` takes, from where the run stands."""
        size, start = self.config.optim.batch_size, self.state.samples_seen
        for batch in self.data.batches(size, seed=self.config.seed, start=start, share=self.share):
            yield batch.to(self.device, non_blocking=True)

    def _step(self, batch: Batch, last: int) -> None:
        """A step on what `batches` gives; terms measure what they like before a record, and in step `last`."""
        number = self.steps_done + 1
        with contextlib.ExitStack() as stack:
            if number % self.config.log.log_every == 0 or number == last:
                for term in self.state.terms:
                    stack.enter_context(term.measured())
            self.step(batch)

    def _record(self, means: dict[str, float], steps: int, seconds: float, waited: float) -> dict[str, Any]:
        record: dict[str, Any] = {
            "step": self.steps_done,
            **{name: value for name, value in means.items() if not name.startswith("cosine/")},
            "lr": self.state.optimizer.param_groups[0]["lr"],
            **self._pace.read(steps * self.config.optim.batch_size, seconds, waited),
            "seconds": self.seconds,
            **self.state.saver.times(),
        }
        for term in self.state.terms:
            record.update(term.facts())
        cosine = {name.removeprefix("cosine/"): v for name, v in means.items() if name.startswith("cosine/")}
        return record | {"cosine": cosine} if cosine else record

    def _seconds_left(self, fraction_before: float, began: float) -> float:
        """Time to the end at the pace since the moment `began`, when `fraction_before` was done."""
        done = self.fraction - fraction_before
        pace = (time.monotonic() - began) / done if done > 0 else math.inf
        return pace * (1 - self.fraction)

    def draw_samples(self) -> Path | None:
        """Draws an overview with the averaged weights, a row for each class or text, always from the same noise."""
        log = self.config.log
        condition = overview_of(self.data, self.num_classes, rows=log.grid_classes, columns=log.grid_columns)
        samples = draw(
            self.ema,
            self.transport,
            self.config.sampling,
            condition.to(self.device),
            seed=self.config.seed,
            autocast_dtype=self.autocast_dtype,
            processes=self.processes,
        )
        if self.run_dir is None or not self.processes.first:
            return None
        stem = self.run_dir / SAMPLES / f"step_{self.steps_done:08d}"
        with surviving_full_disk(str(stem)):
            return self.data.modality.overview(samples, stem, columns=log.grid_columns, lengths=condition.lengths)[0]
        return None
