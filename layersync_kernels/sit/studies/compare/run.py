"""Trains several methods from the same seeds on the same data, in turns, and reports what each is worth."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ....errors import CheckpointError, ConfigError, TrainingDiverged
from ...checkpoints.local import list_checkpoints, read_state
from ...config.io import load_settings, save_config
from ...config.run import TrainConfig
from ...console import console
from ...device import resolve_device, resolve_precision
from ...evaluation.frechet import DIRECTIONS
from ...evaluation.judge import Judge, load_network
from ...files import atomic_path
from ...teachers.clock import TeacherClock
from ...training.folder import start_run
from ...training.loop import Trainer
from ...training.signals import stop_signals
from ...training.terms.repa import RepaTerm
from .config import SETTINGS, CompareCommand, CompareConfig, load_sets, method_config
from .memory import measure_memory
from .plots import save_comparison
from .report import images_per_second, markdown, summarise

MARKS = "marks.json"
"""Name of the measurements in the folder of a run."""
REPORT = "report.md"
_MEMORY = "memory.json"


@dataclass
class Run:
    """One method with one seed.

    Attributes:
        marks: what was measured, in order: "step", "seconds" of training, "validation_loss", "frechet" (or None), and
            what the trainer reports about the steps since the mark before.
    """

    method: str
    seed: int
    folder: Path
    config: TrainConfig
    marks: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> None:
        """Fills `marks` from the folder; those that the newest checkpoint does not know yet are left out."""
        checkpoints, path = list_checkpoints(self.folder), self.folder / MARKS
        self.marks = []
        if checkpoints and path.is_file():
            step = read_state(checkpoints[-1])["step"]
            try:
                self.marks = [mark for mark in json.loads(path.read_text(encoding="utf-8")) if mark["step"] <= step]
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise CheckpointError(f"cannot read {path}: {error!r}; remove {self.folder}") from error

    def add(self, mark: dict[str, Any]) -> None:
        """Appends a mark, on the disk too."""
        self.marks.append(mark)
        with _writing(self.folder / MARKS) as temporary:
            temporary.write_text(json.dumps(self.marks, indent=1) + "\n", encoding="utf-8")


class Comparison:
    """All runs of a comparison, and what they share.

    Args:
        config: what is compared.
        out: its folder, made by `prepare`.
    """

    def __init__(self, config: CompareConfig, out: Path) -> None:
        self.config, self.out = config, out
        train, optim = config.train, config.train.optim
        self.device = resolve_device(train.device)
        self.train_set, self.held_out = load_sets(config, self.device)
        if self.train_set.latent and config.quality_network != "none":
            raise ConfigError(f"{train.data.data} holds latents, at which no network can look: --quality-network none")
        self.steps = [round(optim.steps * i / config.marks) for i in range(config.marks + 1)]
        self.runs: list[Run] = []
        for seed in range(train.seed, train.seed + config.seeds):
            for method in config.methods:
                own = dataclasses.replace(method_config(train, method), seed=seed)
                self.runs.append(Run(method, seed, out / method / f"seed-{seed}", own))

    def train(self, stop_asked: Callable[[], bool]) -> bool:
        """Brings every run to its end, in turns; False when stopped before that."""
        for run in self.runs:
            run.read()
        judge = None
        for run, number in self._turns():
            if self._is_past(run, number):
                continue
            if judge is None:  # a finished comparison needs none
                judge = self._judge()
            if stop_asked() or not self._advance(run, number, judge, stop_asked):
                return False
        return True

    def _turns(self) -> Iterator[tuple[Run, int]]:
        """Seed by seed and mark by mark, each method in turn, every other time backwards."""
        for seed in dict.fromkeys(run.seed for run in self.runs):
            runs = [run for run in self.runs if run.seed == seed]
            for number in range(len(self.steps)):
                for run in runs if number % 2 == 0 else reversed(runs):
                    yield run, number

    def _is_past(self, run: Run, number: int) -> bool:
        last = run.marks[-1] if run.marks else None
        return last is not None and (last["step"] >= self.steps[number] or self._is_late(last["seconds"]))

    def _is_late(self, seconds: float) -> bool:
        limit = self.config.train.optim.max_seconds
        return limit is not None and seconds >= limit

    def _advance(self, run: Run, number: int, judge: Judge, stop_asked: Callable[[], bool]) -> bool:
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
            raise TrainingDiverged(f"{run.method}, seed {run.seed}: {error}; or leave it out of --methods") from error
        last = number == len(self.steps) - 1 or self._is_late(trainer.seconds)
        with_frechet = last or (number > 0 and number % self.config.frechet_every == 0)
        mark: dict[str, Any] = {
            "step": trainer.steps_done,
            "seconds": trainer.seconds,
            "validation_loss": judge.validation_loss(trainer),
            "frechet": judge.frechet(trainer) if with_frechet else None,
            "frechet_floor": judge.floor,
            **trainer.meter.read(),
        }
        if (repa := trainer.term(RepaTerm)) is not None:
            mark["teacher"] = repa.teacher.name
            if number > 0:
                mark["teacher_share"] = repa.clock.share
        run.add(mark)
        trainer.save()
        rate = ""
        if number > 0:
            rate = f", {images_per_second(run.marks, run.config.optim.batch_size)[-1]:.0f} images/s"
        distance = "" if mark["frechet"] is None else f", Fréchet {mark['frechet']:.1f}"
        console.print(
            f"seed {run.seed}  step {mark['step']}/{self.steps[-1]}  {run.method}: validation loss "
            f"{mark['validation_loss']:.4f}{distance}{rate}",
            soft_wrap=True,
        )
        return True

    def _open(self, run: Run) -> Trainer:
        """The trainer of `run` where it stands, warmed up: compilation and the first faults are not on its clock."""
        trainer = Trainer(run.config, self.train_set, run_dir=run.folder)
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

    def _judge(self) -> Judge:
        config, network = self.config, None
        if config.quality_network != "none":
            console.print(f"{config.quality_network} looks at the real samples ...")
            dtype = resolve_precision(config.train.precision, self.device)
            network = load_network(config.quality_network, self.device, dtype)
        return Judge(
            self.train_set,
            self.held_out,
            self.device,
            network,
            held_out_samples=config.held_out,
            reference=config.reference,
            samples=config.samples,
        )

    def memory(self) -> dict[str, int | None]:
        """Bytes that each method's training takes at its peak; measured once for the folder."""
        path = self.out / _MEMORY
        if path.is_file():
            known: dict[str, int | None] = json.loads(path.read_text(encoding="utf-8"))
            return known
        console.print("measuring the memory of each method ...")
        first = self.runs[: len(self.config.methods)]
        # Those with a teacher first: one that is missing shows at once.
        found = {run.method: measure_memory(self.config, run.config) for run in reversed(first)}
        with _writing(path) as temporary:
            temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
        return found

    def report(self, memory: Mapping[str, int | None]) -> Path:
        """Writes the report of the finished comparison, and returns the path of its text."""
        config, train = self.config, self.config.train
        baseline = "vanilla" if "vanilla" in config.methods else config.methods[0]
        runs = [{"method": run.method, "seed": run.seed, "marks": run.marks} for run in self.runs]
        content = {
            "subject": self._subject(),
            "baseline": baseline,
            "seeds": list(dict.fromkeys(run.seed for run in self.runs)),
            "memory": memory,
            "summary": summarise(runs, baseline=baseline, batch_size=train.optim.batch_size),
            "notes": self._notes(),
            "settings": dataclasses.asdict(config),
            "runs": runs,
        }
        path = self.out / REPORT
        picture = path.with_suffix(".png")
        with _writing(path.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        with _writing(path) as temporary:
            temporary.write_text(markdown(content, picture.name), encoding="utf-8")
        with _writing(picture) as temporary:
            save_comparison(content, temporary)
        return path

    def _subject(self) -> str:
        train = self.config.train
        model, optim = train.model, train.optim
        sizes = {"width": model.hidden_size, "depth": model.depth, "patch": model.patch_size}
        own = "".join(f", {name} {value}" for name, value in sizes.items() if value is not None)
        device = f"{self.device}" + (f" ({torch.get_num_threads()} threads)" if self.device.type == "cpu" else "")
        return (
            f"{model.model}{own}; {len(self.train_set)} samples of {self.train_set.spec} from {train.data.data}; "
            f"batches of {optim.batch_size}, learning rate {optim.lr:g} ({optim.lr_schedule}); "
            f"{device}, PyTorch {torch.__version__}."
        )

    def _notes(self) -> list[str]:
        """What a reader has to know to judge the numbers."""
        config, train = self.config, self.config.train
        count = min(config.held_out, len(self.held_out))
        notes = [
            "Runs of one seed start from the same weights and see the same samples, noise and times in the same order. "
            "They take turns from mark to mark, in alternating order. Training time is theirs alone: measuring, saving "
            "and the warm-up after loading are not on the clock.",
            f"Quality is that of the averaged weights, at {len(self.steps)} marks; between marks it is read off a "
            "straight line, and the earliest moment that counts as reached is the first mark.",
            f"Validation loss: the training loss without alignment on {count} samples that no run has seen, with the "
            "same noise and evenly spread times for all.",
            "Peak memory: what training takes beyond what the process had before it, "
            + ("as CUDA's allocator counts it" if self.device.type == "cuda" else "in resident pages")
            + ", over a few steps in a process of its own.",
        ]
        if config.quality_network != "none":
            floor = f"{min(count, config.samples)} held-out ones are at {self.runs[0].marks[-1]['frechet_floor']:.1f}"
            notes.append(
                f"Fréchet distance: {config.samples} samples, drawn from the same noise for all, against "
                f"{min(config.reference, len(self.train_set))} of the training set, in the first {DIRECTIONS} "
                f"principal directions of the pooled features of {config.quality_network}; {floor}. Published "
                "distances are of another network and more samples."
            )
        name = next((run.marks[-1]["teacher"] for run in self.runs if "teacher" in run.marks[-1]), None)
        if name is not None:
            clock = "computing its features is not on the clock" if train.align.features else "it runs in every step"
            notes.append(
                f"repa and both learn from {name}, pretrained on other data; what that took is not on the clock, and "
                f"{clock}."
            )
            if config.quality_network == name:
                notes.append(
                    f"{name} is also the network that judges the samples: that favours the runs which learn from it. "
                    "Their validation loss is free of this."
                )
        if config.seeds > 1:
            notes.append(
                f"The brackets are the range of {config.seeds} seeds, not a confidence interval; differences inside of "
                "them say nothing."
            )
        if train.optim.lr_schedule != "constant":
            notes.append(
                f"The learning rate falls over the steps ({train.optim.lr_schedule}): readings before the end, such as "
                "those after equal seconds, are of runs that have not finished their schedule."
            )
        return notes


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A temporary name for `path` (see `atomic_path`), with an error for the user where it cannot be written."""
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        raise CheckpointError(f"cannot write the comparison: {error}") from error


def prepare(config: CompareConfig, out: Path, *, resume: bool = False) -> None:
    """Makes the folder of a comparison, or makes sure that it holds this one.

    Raises:
        ConfigError: it holds a comparison with other settings (more seeds may be asked for), or something else.
        CheckpointError: it cannot be written.
    """
    config.validate()
    path = out / SETTINGS
    if path.is_file():
        before = load_settings(path, CompareConfig)
        same = dataclasses.replace(config, seeds=before.seeds) if config.seeds > before.seeds else config
        if different := list(_differences(dataclasses.asdict(before), dataclasses.asdict(same))):
            raise ConfigError(
                f"{out} was begun with other settings: {'; '.join(different)}; choose another --out, or go on there "
                "with --resume and no other flag"
            )
    elif resume:
        raise ConfigError(f"{out} is not a comparison to resume: it has no {SETTINGS}")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not a comparison (it has no {SETTINGS}); choose another --out")
    with _writing(path) as temporary:
        save_config(config, temporary)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in before.items():
        if isinstance(value, dict):
            yield from _differences(value, now[name], name.removesuffix("when") if name.endswith("when") else "")
        elif value != now[name]:
            yield f"--{(prefix + name).replace('_', '-')} was {value}, now {now[name]}"


def compare(command: CompareCommand) -> Path | None:
    """Trains, measures and reports as `command` asks: the path of the report, or None when stopped before the end.

    Raises:
        UserError: whatever can be put right: settings, data, folders, a full disk, a loss that is not finite.
    """
    prepare(command.comparison, command.out, resume=command.resume)
    comparison = Comparison(command.comparison, command.out)
    memory = comparison.memory()
    with stop_signals() as stop_asked:
        finished = comparison.train(stop_asked)
    if not finished:
        console.print(f"stopped and saved; go on with: layersync compare --out {command.out} --resume")
        return None
    return comparison.report(memory)
