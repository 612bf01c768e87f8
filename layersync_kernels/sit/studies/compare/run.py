"""Trains several methods from the same seeds on the same data, in turns, and reports what each is worth."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ....errors import CheckpointError, ConfigError, TrainingDiverged, UserError
from ...checkpoints.local import list_checkpoints
from ...checkpoints.weights import warn_of_first_weights
from ...console import console
from ...data.base import SampleSet
from ...data.registry import load_data
from ...device import resolve_device, resolve_precision
from ...diffusion.transport import build_transport
from ...evaluation.arrays import kind_of
from ...evaluation.judge import WITHOUT, Judge
from ...evaluation.networks import Network
from ...evaluation.registry import as_recorded, kept_in, load_network
from ...evaluation.validation import CHUNK
from ...files import atomic_path, write_json
from ...teachers.clock import TeacherClock
from ...training.folder import start_run
from ...training.loop import Trainer
from ...training.terms.repa import RepaTerm
from ..pair.config import MIN_SAMPLES
from ..pair.run import analyse, measure
from .config import MOST_HELD_OUT, CompareConfig, load_sets
from .folder import Run, writing
from .memory import measure_memory
from .pilot import Pilot, pilot_config
from .plan import describe, pairs_of, plan_text, primary
from .plots import save_comparison
from .report import markdown, notes
from .summary import images_per_second, summarise

REPORT = "report.md"
"""Name of the text in the folder of a comparison; the numbers and the picture lie beside it, as .json and .png."""
PLAN = "plan.md"
"""Name of what was written before the first step."""
PILOT = "pilot"
"""Name of the folder of the pilot."""
PROBE_TIMES = (0.25, 0.5, 0.75, 1.0)
"""At which blocks are looked at: noised, and clean."""
_MEMORY = "memory.json"


class Comparison:
    """All runs of a comparison, and what they share. Made from settings and data; `prepare` makes its folder.

    Args:
        config: what is compared.
        out: its folder.
        device: where, in the place of --device.
        sets: what `load_sets` gives for the config, where that has been read already.

    Raises:
        ConfigError, DataError: the data cannot be used, or has not enough samples to hold out.
    """

    def __init__(
        self,
        config: CompareConfig,
        out: Path,
        *,
        device: str | None = None,
        sets: tuple[SampleSet, SampleSet] | None = None,
    ) -> None:
        self.config, self.out = config, out
        train, optim = config.train, config.train.optim
        self.device = resolve_device(device or train.device)
        self.precision = resolve_precision(train.precision, self.device)
        self.train_set, self.held_out = load_sets(config, self.device) if sets is None else sets
        self.held_out_samples = min(config.held_out or MOST_HELD_OUT, len(self.held_out))
        if self.held_out_samples < 2 and config.quality_network != "none":
            raise ConfigError(
                "a Fréchet distance needs 2 held-out samples or more: --held-out 2, --quality-network none"
            )
        self.steps = [round(optim.steps * i / config.marks) for i in range(config.marks + 1)]
        self.runs: list[Run] = []
        arms = config.arms()
        for seed in range(train.seed, train.seed + config.seeds):
            for arm in arms:
                own = dataclasses.replace(arm.config, seed=seed)
                self.runs.append(Run(arm.name, seed, out / arm.name / f"seed-{seed}", own))

    def check(self) -> None:
        """Makes a trainer of each method and the network that judges, so that what cannot work shows at once.

        Raises:
            UserError: a model, teacher or network that is unknown, missing or does not fit, or too few samples for it.
        """
        _ = self._network
        warn_of_first_weights(self.config.train.optim, self.steps[-1])
        for run in reversed(self.runs[: len(self.config.methods)]):  # those with a teacher first
            Trainer(run.config, self.train_set, device=self.device)
        _ = self._judge
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # memory is measured in another process

    @functools.cached_property
    def _network(self) -> Network | None:
        name = self.config.quality_network
        if name == "none":
            return None
        try:
            return load_network(
                None if name == "auto" else name,
                kind_of(self.train_set.modality),
                self.device,
                splits=self._splits,
                folder=kept_in(),
            )
        except UserError as error:
            text = str(error).replace("--features", "--quality-network", 1)
            raise type(error)(f"{text}; or {WITHOUT}") from error

    def _splits(self) -> tuple[SampleSet, SampleSet]:
        """What the runs are trained on, and others: the test split where they are of the training split."""
        data = self.config.train.data
        if data.split != "train":
            return self.train_set, self.held_out
        return self.train_set, load_data(dataclasses.replace(data, split="test"))

    def _recorded(self) -> tuple[SampleSet, SampleSet] | None:
        """The samples of the runs and those held out as sounds, where the runs see spectrograms."""
        plain = as_recorded(self.config.train.data, self.train_set.modality)
        if plain is None:
            return None
        own = dataclasses.replace(self.config.train, data=plain)
        return load_sets(dataclasses.replace(self.config, train=own, held_out=len(self.held_out)), self.device)

    @property
    def seeds(self) -> list[int]:
        """Of the runs."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def read(self) -> None:
        """Reads what the runs have measured so far; raises CheckpointError, see `Run.read`."""
        for run in self.runs:
            run.read()

    def train(self, stop_asked: Callable[[], int], seeds: Collection[int] | None = None) -> bool:
        """Brings every run, or those of some seeds, to its end, in turns; False when stopped before that."""
        self.read()
        judge = None
        for run, number in self._turns():
            if self._is_past(run, number) or (seeds is not None and run.seed not in seeds):
                continue
            if judge is None:  # a finished comparison needs none
                judge = self._judge
            if stop_asked() or not self._advance(run, number, judge, stop_asked):
                return False
        return True

    def _turns(self) -> Iterator[tuple[Run, int]]:
        """Seed by seed and mark by mark, each method in turn, every other time backwards."""
        for seed in self.seeds:
            runs = [run for run in self.runs if run.seed == seed]
            for number in range(len(self.steps)):
                for run in runs if number % 2 == 0 else reversed(runs):
                    yield run, number

    def _is_past(self, run: Run, number: int) -> bool:
        """Whether `run` has this mark, or has ended before it."""
        last = run.marks[-1] if run.marks else None
        return last is not None and (last["step"] >= self.steps[number] or self._is_late(last["seconds"]))

    def _is_late(self, seconds: float) -> bool:
        """Whether that much training is all that --max-seconds allows."""
        limit = self.config.train.optim.max_seconds
        return limit is not None and seconds >= limit

    def _advance(self, run: Run, number: int, judge: Judge, stop_asked: Callable[[], int]) -> bool:
        """Trains `run` up to a mark and measures it there; False when stopped on the way. Either way it is saved.

        Only one trainer is alive at a time, made from its checkpoint: whatever an interruption does happens all the
        time, and a method's memory is its own.
        """
        try:
            trainer = self._open(run)
            while trainer.steps_done < self.steps[number] and not self._is_late(trainer.seconds):
                if stop_asked():
                    trainer.save()
                    return False
                every = run.config.log.checkpoint_every
                target = min(self.steps[number], (trainer.steps_done // every + 1) * every)
                trainer.advance(target, lambda: stop_asked() or self._is_late(trainer.seconds))
                if trainer.steps_done < self.steps[number]:
                    trainer.save()
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{run.arm}, seed {run.seed}: {error}; or leave it out of --methods") from error
        run.add(self._measure(trainer, number, judge))
        trainer.save()
        self._say(run, number)
        return True

    def _open(self, run: Run) -> Trainer:
        """The trainer of `run` where it stands, warmed up: compilation and the first faults are not on its clock."""
        trainer = Trainer(run.config, self.train_set, device=self.device, run_dir=run.folder)
        checkpoints = list_checkpoints(run.folder)
        if not checkpoints:
            start_run(run.folder, run.config, overwrite=False)
            checkpoints = [trainer.save()]
        trainer.advance(trainer.steps_done + 1)
        trainer.meter.read()
        trainer.load(checkpoints[-1])
        if (repa := trainer.term(RepaTerm)) is not None:
            repa.clock = TeacherClock(trainer.device)
        return trainer

    def _measure(self, trainer: Trainer, number: int, judge: Judge) -> dict[str, Any]:
        """The mark of that number, see `Run`."""
        last = number == len(self.steps) - 1 or self._is_late(trainer.seconds)
        with_frechet = last or (number > 0 and number % self.config.frechet_every == 0)
        mark: dict[str, Any] = {
            "step": trainer.steps_done,
            "seconds": trainer.seconds,
            "validation_loss": judge.validation_loss(trainer.ema),
            "frechet": judge.frechet(trainer.ema) if with_frechet else None,
            "frechet_floor": judge.floor,
            "frechet_dimensions": judge.dimensions,
            **trainer.meter.read(),
        }
        if self.config.probe_samples and (number == 0 or last):
            mark["blocks"] = self._blocks(trainer)
        if (repa := trainer.term(RepaTerm)) is not None:
            mark["teacher"] = repa.teacher.name
            if number > 0:
                mark["teacher_share"] = repa.clock.share
        return mark

    def _blocks(self, trainer: Trainer) -> dict[str, Any] | None:
        """What `layersync probe` finds in the averaged weights; None for a model of one block."""
        count = min(self.config.probe_samples, len(self.held_out))
        if trainer.ema.depth < 2 or count < MIN_SAMPLES:
            return None
        states = measure(
            trainer.ema,
            trainer.transport.interpolant,
            self.held_out,
            samples=count,
            times=PROBE_TIMES,
            batch_size=CHUNK,
            seed=0,
            device=self.device,
            autocast_dtype=self.precision,
        )
        found = analyse(states, times=PROBE_TIMES, null_label=trainer.ema.guidable, checkpoint="")
        return dataclasses.asdict(found)

    def _say(self, run: Run, number: int) -> None:
        """Shows the newest mark of `run` on the terminal."""
        mark, rate = run.marks[-1], ""
        if number > 0:
            rate = f", {images_per_second(run.marks, run.config.optim.batch_size)[-1]:.0f} images/s"
        distance = "" if mark["frechet"] is None else f", Fréchet {mark['frechet']:.4g}"
        console.print(
            f"seed {run.seed}  step {mark['step']}/{self.steps[-1]}  {run.arm}: validation loss "
            f"{mark['validation_loss']:.4f}{distance}{rate}",
            soft_wrap=True,
        )

    @functools.cached_property
    def _judge(self) -> Judge:
        config, network = self.config, self._network
        if network is not None:
            console.print(f"{network.name} looks at the real samples ...")
        return Judge(
            self.train_set,
            self.held_out,
            self.device,
            network,
            recorded=None if network is None else self._recorded(),
            source=f"--data {config.train.data.data}",
            transport=build_transport(config.train.transport),
            sampling=config.train.sampling,
            autocast_dtype=self.precision,
            held_out_samples=self.held_out_samples,
            reference=config.reference,
            samples=config.samples,
            folder=kept_in(),
        )

    def memory(self) -> dict[str, int | None]:
        """Bytes that each arm's training takes at its peak; measured once for the folder."""
        path = self.out / _MEMORY
        if path.is_file():
            known: dict[str, int | None] = json.loads(path.read_text(encoding="utf-8"))
            return known
        console.print("measuring the memory of each method ...")
        first = self.runs[: len(self.config.methods)]
        found = {run.arm: measure_memory(self.config, run.config) for run in first}
        with writing():
            write_json(path, found)
        return found

    def small(self) -> Comparison:
        """The pilot of this one, on the same samples."""
        return Comparison(pilot_config(self.config), self.out / PILOT, sets=(self.train_set, self.held_out))

    @property
    def begun(self) -> bool:
        """Whether a run has been trained already."""
        return any(list_checkpoints(run.folder) for run in self.runs)

    def plan(self, pilot: Pilot | None) -> str:
        """What is going to be done and how it will be read; written once, before the first step of any run."""
        path = self.out / PLAN
        if not path.is_file():
            subject = describe(self.config, self.train_set, self.device, held_out=self.held_out_samples)
            with writing(), atomic_path(path) as temporary:
                temporary.write_text(plan_text(self.config, subject, pilot, late=self.begun), encoding="utf-8")
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error

    def report(self, memory: Mapping[str, int | None], plan: str) -> Path:
        """Writes the report of the finished comparison, and returns the path of its text."""
        config, train = self.config, self.config.train
        runs = [{"arm": run.arm, "seed": run.seed, "marks": run.marks} for run in self.runs]
        content = {
            "plan": plan,
            "baseline": config.baseline,
            "primary": primary(config),
            "seeds": self.seeds,
            "memory": memory,
            "pairs": {run.arm: pairs_of(run.config) for run in self.runs},
            "summary": summarise(runs, baseline=config.baseline, batch_size=train.optim.batch_size),
            "notes": notes(
                config,
                runs,
                self.device,
                kind=kind_of(self.train_set.modality),
                trained=len(self.train_set),
                held_out=self.held_out_samples,
            ),
            "settings": dataclasses.asdict(config),
            "runs": runs,
        }
        path = self.out / REPORT
        picture = path.with_suffix(".png")
        with writing():
            write_json(path.with_suffix(".json"), content)
            with atomic_path(path) as temporary:
                temporary.write_text(markdown(content, picture.name), encoding="utf-8")
            save_comparison(content, picture)
        return path
