"""The reference trainer: a SiT on one device, with LayerSync as one term of the loss."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, DataError, TeacherError, TrainingDiverged
from ...losses.representation import RepresentationAlignmentLoss
from ...runtime.memory import keep_freed_memory
from ..checkpoints.local import (
    list_checkpoints,
    load_optimizer,
    optimizer_tensors,
    read_state,
    read_tensors,
    save_checkpoint,
)
from ..checkpoints.weights import Weights, fill_model, load_weights
from ..config.run import SAMPLES, TrainConfig
from ..data.base import SampleSet
from ..data.registry import load_data
from ..device import resolve_device, resolve_precision
from ..diffusion.transport import build_transport
from ..models.registry import build_model
from ..sampling.draw import draw
from ..sampling.grid import save_grid
from ..teachers.base import Teacher, not_finite
from ..teachers.clock import TeacherClock
from ..teachers.features import Features, latent_message
from ..teachers.networks import load_teacher
from .runlog import Meter, RunLog, surviving_full_disk
from .signals import stop_signals
from .terms import build_alignment, build_repa

logger = logging.getLogger(__name__)


PROJECTOR = "projector"
"""File of REPA's projector in a checkpoint, and the prefix of its parameters among the optimiser's."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    step: int
    ended: Literal["finished", "interrupted"]
    seconds: float
    metrics: dict[str, Any]


class Trainer:
    """Everything that training changes: weights, their average, optimiser, generators, step.

    `step` does one optimiser step on a batch; `fit` is the loop around it with logs, pictures and checkpoints.

    Args:
        config: the run.
        data: replaces what `config.data` names.
        run_dir: folder made by `start_run`; None writes nothing.

    Attributes:
        model, ema: the network, and the copy that holds the averaged weights (fp32, evaluation mode).
        alignment: the LayerSync loss, or None; any module with its interface can be put here.
        teacher, repa: the pretrained network or its precomputed features, and the loss with its projector; or None.
        teacher_clock: measures the teacher's share of the steps whose end `fit` records.
        steps_done: optimiser steps so far.
        samples_seen: position in the shuffled stream of samples.

    Raises:
        ConfigError, DataError, CheckpointError: as the pieces do.
    """

    def __init__(self, config: TrainConfig, data: SampleSet | None = None, *, run_dir: Path | None = None) -> None:
        config.validate()
        self.config = config
        self.run_dir = run_dir
        self.device = resolve_device(config.device)
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
        self.num_classes = config.model.num_classes or self.data.num_classes
        if self.num_classes < self.data.num_classes:
            raise ConfigError(f"--num-classes {self.num_classes}: the data has {self.data.num_classes}")
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, self.data.spec, self.num_classes)
        if config.model.init is not None:
            fill_model(self.model, load_weights(config.model.init))
        self.model.to(self.device).train()
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.alignment = build_alignment(config.layersync, len(self.model.blocks))
        self.teacher, self.repa = None, None
        if config.align.align != "off":
            with torch.random.fork_rng(devices=[]):  # with REPA or without: the same numbers for everything else
                self.teacher, self.repa = self._build_repa()
        self.teacher_clock = TeacherClock(self.device)
        self.transport = build_transport(config.transport)
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        averaged = dict(self.ema.named_parameters())
        self._names = [name for name, _ in trained]
        self._params: list[Tensor] = [p for _, p in trained]
        self._averages: list[Tensor] = [averaged[name] for name in self._names]
        projector = [] if self.repa is None else list(self.repa.named_parameters(prefix=PROJECTOR))
        self._names += [name for name, _ in projector]
        self._trained: list[Tensor] = self._params + [p for _, p in projector]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self._trained,
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype == torch.float16)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        if config.compile == "on" or (config.compile == "auto" and self.device.type == "cuda"):
            for block in self.model.blocks:
                block.compile()
        self.steps_done = 0
        self.samples_seen = 0
        self.meter = Meter()
        self._earlier_seconds = 0.0
        self._started: float | None = None
        self._unchecked: list[Tensor] = []  # the loss of each step since `check_finite`, still on the device
        self._unchecked_teacher: list[Tensor] = []  # a sum of the teacher's tokens, likewise

    def _build_repa(self) -> tuple[Teacher | Features, RepresentationAlignmentLoss]:
        align, data = self.config.align, self.data
        teacher: Teacher | Features
        if align.features is not None:
            teacher = Features(align.features, data, teacher=align.teacher, flip=self.config.data.flip)
            width = teacher.width
        elif data.latent:
            raise DataError(latent_message(self.config.data.data))
        else:
            assert align.teacher is not None  # `validate` has seen to that
            grid = data.spec.side // self.model.patch_size
            teacher = load_teacher(align.teacher, size=align.teacher_size, grid=grid, weights=align.teacher_weights)
            teacher.to(self.device)
            width = teacher.width(data.take(torch.arange(min(2, len(data)))).to(self.device))
        return teacher, build_repa(align, self.model, teacher.name, width).to(self.device)

    @property
    def seconds(self) -> float:
        """Time spent in `fit` and `advance` so far, that of resumed runs included."""
        return self._earlier_seconds + (0.0 if self._started is None else time.monotonic() - self._started)

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]: of its steps, or of its time where that is further."""
        optim = self.config.optim
        fraction = self.steps_done / optim.steps
        if optim.max_seconds is not None:
            fraction = max(fraction, self.seconds / optim.max_seconds)
        return min(fraction, 1.0)

    def learning_rate(self) -> float:
        """The rate of the next step."""
        optim = self.config.optim
        rate = optim.lr * min(1.0, (self.steps_done + 1) / max(optim.warmup_steps, 1))
        if optim.lr_schedule == "linear":
            rate *= 1 - self.fraction
        elif optim.lr_schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * self.fraction))
        return rate

    def step(self, samples: Tensor, labels: Tensor, index: Tensor | None = None) -> None:
        """One optimiser step; nothing is read from the device, except where precomputed features of flipped samples
        are looked up.

        Args:
            samples: float32 (B, C, H, W), B a multiple of `accumulate`.
            labels: int64 (B,).
            index: int64 (B,) numbers of the samples, for precomputed features.
        """
        optim = self.config.optim
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        mirrored = None
        if self.config.data.flip:
            mirrored = torch.rand(len(samples), 1, 1, 1, device=self.device, generator=self.generator) < 0.5
            samples = torch.where(mirrored, samples.flip(3), samples)
        alignment = self.alignment
        if alignment is not None and not alignment.active(self.steps_done):
            alignment = None
        repa = self.repa
        if repa is not None and not repa.active(self.steps_done):
            repa = None
        capture: list[Any] = []
        for loss in (alignment, repa):
            if loss is not None:
                blocks = loss.captures if self.model.kernels == "fused" else loss.layers
                capture += [block for block in blocks if block not in capture]
        targets = self._targets(samples, index, mirrored)
        step_loss = torch.zeros((), device=self.device)
        for x, y in zip(samples.chunk(optim.accumulate), labels.chunk(optim.accumulate), strict=True):
            inputs: dict[str, Any] = {"y": y}
            if capture:
                inputs["capture"] = capture
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                terms = self.transport.training_losses(self.model, x, inputs, generator=self.generator)
                loss = terms["loss"].mean()
                total = loss
                if alignment is not None:
                    aligned = alignment(terms["states"], step=self.steps_done)
                    total = loss + aligned
                if repa is not None:
                    target = next(targets)
                    repa_loss = self._repa_loss(repa, terms["states"], target)
                    total = total + repa_loss
            self.scaler.scale(total / optim.accumulate).backward()
            step_loss = step_loss + total.detach()
            self.meter.add("loss", loss)
            if alignment is not None:
                self.meter.add("align_loss", aligned)
                for pair, cosine in alignment.cosine.items():
                    self.meter.add(f"cosine/{pair}", cosine)
            if repa is not None:
                self._unchecked_teacher.append(target.float().sum())
                self.meter.add("repa_loss", repa_loss)
                for pair, cosine in repa.cosine.items():
                    self.meter.add(f"cosine/{pair}", cosine)
        if optim.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            self.meter.add("grad_norm", torch.nn.utils.clip_grad_norm_(self._trained, optim.clip_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        self.steps_done += 1
        self.samples_seen += len(samples)
        self._unchecked.append(step_loss)

    def _targets(self, samples: Tensor, index: Tensor | None, mirrored: Tensor | None) -> Iterator[Tensor]:
        """The teacher's tokens of the batch, pass by pass."""
        passes = self.config.optim.accumulate
        if isinstance(self.teacher, Features):
            if index is None:
                raise ValueError("Trainer.step: precomputed features need the numbers of the samples; give index=")
            with self.teacher_clock.measure():
                tokens = self.teacher.tokens(index, mirrored).to(self.device, non_blocking=True)
            yield from tokens.chunk(passes)
        elif self.teacher is not None:
            for x in samples.chunk(passes):
                with self.teacher_clock.measure():
                    tokens = self.teacher(x)
                yield tokens

    def _repa_loss(self, repa: RepresentationAlignmentLoss, states: dict[Any, Any], target: Tensor) -> Tensor:
        try:
            return repa(states, target, step=self.steps_done)
        except ValueError as error:  # token counts that cannot be interpolated; NaN in the very first call
            raise TeacherError(f"the teacher {repa.pairs[0][1]} does not fit: {error}") from error

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the average: ema ← decay · ema + (1 - decay) · weights."""
        decay = self.config.optim.ema_decay
        if self.config.optim.ema_warmup:
            decay = min(decay, (1 + self.steps_done) / (10 + self.steps_done))
        torch._foreach_lerp_(self._averages, self._params, 1 - decay)

    def check_finite(self) -> None:
        """Reads back whether all losses since the last check, and the weights now, are finite.

        Raises:
            TrainingDiverged: naming the step and the last good checkpoint.
        """
        losses, self._unchecked = self._unchecked, []
        sums, self._unchecked_teacher = self._unchecked_teacher, []
        bad = [] if not losses else torch.stack(losses).isfinite().logical_not().nonzero().flatten().tolist()
        if bad:
            what = f"the loss was not finite at step {self.steps_done - len(losses) + bad[0] + 1}"
            if self.teacher is not None and sums and not torch.stack(sums).isfinite().all():
                raise TrainingDiverged(
                    f"{what}: {not_finite(self.teacher.name)}; check its weights and features, or use --precision fp32 "
                    f"or bf16; {self._last_good()}"
                )
        elif not torch.stack(torch._foreach_norm([*self._trained, *self._averages])).isfinite().all():
            what = f"the weights were not finite after step {self.steps_done}"
        else:
            return
        raise TrainingDiverged(
            f"{what}; {self._last_good()}. Lower --lr, set --clip-norm 1, or use --precision fp32 or bf16"
        )

    def _last_good(self) -> str:
        checkpoints = list_checkpoints(self.run_dir) if self.run_dir else []
        return f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint had been saved yet"

    def save(self) -> Path:
        """Writes a checkpoint, unless something is not finite.

        Raises:
            TrainingDiverged: see `check_finite`.
            CheckpointError: it cannot be written; the older ones are intact.
        """
        if self.run_dir is None:
            raise ConfigError("this trainer has no run folder to save to")
        self.check_finite()
        rng = {"cpu": torch.get_rng_state(), "noise": self.generator.get_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self._names),
            "rng": rng,
        }
        if self.repa is not None:
            tensors[PROJECTOR] = self.repa.state_dict()
        state = {
            "step": self.steps_done,
            "samples_seen": self.samples_seen,
            "seconds": self.seconds,
            "scaler": self.scaler.state_dict(),
            "data": {
                "shape": self.data.spec.shape,
                "num_classes": self.num_classes,
                "class_names": self.data.class_names,
                "latent": self.data.latent,
            },
        }
        return save_checkpoint(self.run_dir, self.steps_done, tensors, state, keep=self.config.log.keep)

    def load(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint folder: the same weights, average, optimiser, random numbers and data order.

        Raises:
            CheckpointError: it is damaged or belongs to another model; names the file.
        """
        state = read_state(checkpoint)
        files = {
            stem: read_tensors(checkpoint / f"{stem}.safetensors") for stem in ("model", "ema", "optimizer", "rng")
        }
        fill_model(self.model, Weights(files["model"], checkpoint / "model.safetensors"))
        fill_model(self.ema, Weights(files["ema"], checkpoint / "ema.safetensors"))
        if self.repa is not None:
            path = checkpoint / f"{PROJECTOR}.safetensors"
            if not path.is_file():
                raise CheckpointError(f"{checkpoint} was trained without a teacher; resume it with --align off")
            fill_model(self.repa, Weights(read_tensors(path), path))
        try:
            load_optimizer(self.optimizer, self._names, files["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(files["rng"]["cpu"])
            self.generator.set_state(files["rng"]["noise"])
            if self.device.type == "cuda" and "cuda" in files["rng"]:
                torch.cuda.set_rng_state(files["rng"]["cuda"], self.device)
            self.steps_done, self.samples_seen = int(state["step"]), int(state["samples_seen"])
            self._earlier_seconds = float(state["seconds"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{checkpoint} does not fit this run: {type(error).__name__}: {error}") from error

    def advance(self, steps: int, stop_asked: Callable[[], bool] = lambda: False) -> None:
        """Trains on to step `steps`, or until `stop_asked`, without log and checkpoints, for a caller that measures.

        Raises:
            TrainingDiverged: a loss or weight is not finite.
        """
        batches = self._batches()
        self._started = time.monotonic()
        try:
            while self.steps_done < steps and not stop_asked():
                self._step(next(batches), steps)
            self.check_finite()  # waits for the device, too
        finally:
            self._earlier_seconds, self._started = self.seconds, None

    def fit(self) -> Outcome:
        """Trains until the steps or the seconds are used up, or until Ctrl-C or SIGTERM.

        Raises:
            TrainingDiverged: a loss or weight is not finite; checkpoints from before stay.
            CheckpointError: the last checkpoint cannot be written; earlier ones that fail only warn.
        """
        config, optim = self.config, self.config.optim
        fraction_before, began = self.fraction, time.monotonic()
        self._started = began
        last_record, recorded_step = time.monotonic(), self.steps_done
        metrics: dict[str, Any] = {}
        done = self.fraction >= 1
        batches = self._batches()
        log = RunLog(self.run_dir, step=self.steps_done, steps=optim.steps, tensorboard=config.log.tensorboard)
        with stop_signals() as stop_asked, log:
            while not (done or stop_asked()):
                self._step(next(batches), optim.steps)
                done = self.fraction >= 1
                log.advance(self.steps_done, self.fraction)
                if done or self.steps_done % config.log.log_every == 0:
                    means = self.meter.read()
                    now = time.monotonic()
                    rate = (self.steps_done - recorded_step) * optim.batch_size / (now - last_record)
                    metrics = self._record(means, rate)
                    log.record(metrics, seconds_left=self._seconds_left(fraction_before, began))
                    self.check_finite()
                    last_record, recorded_step = time.monotonic(), self.steps_done
                if self.run_dir is None or done:
                    continue
                paused = time.monotonic()
                if self.steps_done % config.log.checkpoint_every == 0:
                    try:
                        self.save()
                    except CheckpointError as error:
                        logger.error("%s; training goes on, and tries again at the next checkpoint", error)
                if config.log.sample_every and self.steps_done % config.log.sample_every == 0:
                    self.draw_samples()
                    log.draw_curves()
                last_record += time.monotonic() - paused  # images/s count training alone
            if self.run_dir is not None:
                self.save()
                if done and config.log.sample_every:
                    self.draw_samples()
                log.draw_curves()
        self._earlier_seconds, self._started = self.seconds, None
        return Outcome(self.steps_done, "finished" if done else "interrupted", self.seconds, metrics)

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        """What `step` takes, from where the run stands."""
        stream = {"seed": self.config.seed, "start": self.samples_seen}
        numbers = self.data.numbers(self.config.optim.batch_size, **stream)
        for samples, labels in self.data.batches(self.config.optim.batch_size, **stream):
            batch = samples.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            yield (*batch, next(numbers)) if isinstance(self.teacher, Features) else batch

    def _step(self, batch: tuple[Tensor, ...], last: int) -> None:
        """A step on what `_batches` gives; the teacher's share is measured before a record, and in step `last`."""
        number = self.steps_done + 1
        measured = self.teacher is not None and (number % self.config.log.log_every == 0 or number == last)
        with self.teacher_clock.step() if measured else contextlib.nullcontext():
            self.step(*batch)

    def _record(self, means: dict[str, float], images_per_second: float) -> dict[str, Any]:
        record: dict[str, Any] = {
            "step": self.steps_done,
            **{name: value for name, value in means.items() if not name.startswith("cosine/")},
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": images_per_second,
            "seconds": self.seconds,
        }
        if self.repa is not None and not math.isnan(self.teacher_clock.share):
            record["teacher_share"] = self.teacher_clock.share
        cosine = {name.removeprefix("cosine/"): v for name, v in means.items() if name.startswith("cosine/")}
        return record | {"cosine": cosine} if cosine else record

    def _seconds_left(self, fraction_before: float, began: float) -> float:
        """Time to the end at the pace since the moment `began`, when `fraction_before` was done."""
        done = self.fraction - fraction_before
        pace = (time.monotonic() - began) / done if done > 0 else math.inf
        return pace * (1 - self.fraction)

    def draw_samples(self) -> Path | None:
        """Draws a grid with the averaged weights, one row per class, always from the same noise."""
        log = self.config.log
        classes = torch.arange(min(log.grid_classes, self.num_classes))
        labels = classes.repeat_interleave(log.grid_columns).to(self.device)
        samples = draw(
            self.ema,
            self.transport,
            self.config.sampling,
            labels,
            seed=self.config.seed,
            autocast_dtype=self.autocast_dtype,
        )
        if self.run_dir is None:
            return None
        path = self.run_dir / SAMPLES / f"step_{self.steps_done:08d}.png"
        with surviving_full_disk(str(path)):
            return save_grid(samples, path, columns=log.grid_columns, latent=self.data.latent)
        return None
