"""Trains several methods from the same seeds on the same data, in turns, and reports what each is worth."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError, DataError, TrainingDiverged
from .build import resolve_device, resolve_precision
from .checkpoint import atomic_path, list_checkpoints, read_state
from .config import TrainConfig, load_settings, save_config
from .data import SampleSet, load_data
from .plots import save_comparison
from .quality import DIRECTIONS, Judge, hold_out, load_network
from .report import images_per_second, markdown, summarise
from .runlog import console
from .teacher import TeacherClock
from .train import Trainer, start_run, stop_signals

logger = logging.getLogger(__name__)

SETTINGS = "compare.json"
"""Name of the settings file in the folder of a comparison."""
MARKS = "marks.json"
"""Name of the measurements in the folder of a run."""
REPORT = "report.md"
_MEMORY = "memory.json"
_MEMORY_STEPS = 3
_METHODS = ("vanilla", "layersync", "repa", "both")
_TEACHER = "efficientnet-lite0"


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, and how."""

    train: TrainConfig = field(default_factory=TrainConfig)
    methods: tuple[str, ...] = _METHODS
    """vanilla (neither), layersync, repa, both. Which LayerSync and which teacher, the flags of `layersync train` say;
    without --align it is REPA with efficientnet-lite0."""
    seeds: int = 3
    """Runs of each method: seeds --seed, --seed + 1 ..."""
    marks: int = 8
    """How often the quality is measured, evenly over --steps; runs take turns from mark to mark."""
    held_out: int = 1000
    """Samples kept from training for the validation loss."""
    validation: Path | None = None
    """Take the held-out samples from this .npz or .safetensors file, and train on all of --data."""
    quality_network: str = _TEACHER
    """Network whose features the Fréchet distance compares; none: no Fréchet distance."""
    samples: int = 1000
    """Samples drawn for a Fréchet distance, by the solver of the sampling flags."""
    reference: int = 5000
    """Training samples that they are compared with."""
    frechet_every: int = 4
    """Marks between two Fréchet distances; the last mark always has one."""

    def validate(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: naming the flag, its value and what it may be.
        """
        for method in self.methods:
            if method in _METHODS:
                method_config(self.train, method).validate()
        low = {"seeds": 1, "marks": 1, "held_out": 1, "samples": 2, "reference": 2, "frechet_every": 1}
        for name, least in low.items():
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
        if self.marks > self.train.optim.steps:
            raise ConfigError(f"--marks {self.marks}: there are only {self.train.optim.steps} steps")
        unknown = sorted(set(self.methods) - set(_METHODS))
        if unknown or len(self.methods) < 2 or len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"--methods {' '.join(self.methods)}: expected two or more of {', '.join(_METHODS)}")
        if self.train.layersync.layersync == ("off",) and set(self.methods) & {"layersync", "both"}:
            raise ConfigError("--layersync off leaves nothing to compare; leave it out, or choose other --methods")
        if self.validation is None and self.train.align.features is not None:
            raise ConfigError("--features are those of all samples, so none can be held out: give --validation FILE")


@dataclass(frozen=True)
class CompareCommand:
    """Train vanilla, LayerSync, REPA and both from the same seeds; write report.md, report.png and report.json.

    Each run trains for --steps, or for --max-seconds of training where that is less. Runs of one seed take turns, so
    that a slow spell of the machine hits all methods alike. Stopped and called again, it goes on where it was.
    """

    comparison: CompareConfig = field(default_factory=CompareConfig)
    out: Path = Path("runs/compare")
    """Folder of the comparison; its runs are METHOD/seed-N in it, as `layersync train` makes them."""
    resume: bool = False
    """Take the settings of the comparison in --out, so that no flag has to be repeated."""


def method_config(config: TrainConfig, method: str) -> TrainConfig:
    """`config` as `method` trains it. The time limit goes: `Comparison` sees to it; the rate follows steps."""
    replace = dataclasses.replace
    config = replace(config, optim=replace(config.optim, max_seconds=None))
    if method in ("vanilla", "repa"):
        config = replace(config, layersync=replace(config.layersync, layersync=("off",)))
    align = config.align
    if method in ("vanilla", "layersync"):
        align = replace(align, align="off", teacher=None, features=None)
    elif align.align == "off":
        align = replace(align, align="repa")
        if align.teacher is None and align.features is None:
            align = replace(align, teacher=_TEACHER)
    return replace(config, align=align)


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


def load_sets(config: CompareConfig, device: torch.device) -> tuple[SampleSet, SampleSet]:
    """What the runs are trained on, and what is held out.

    Raises:
        ConfigError: there is not enough to hold out.
        DataError: the data cannot be used, or differs from that of --validation.
    """
    data = load_data(config.train.data, device)
    if config.validation is None:
        return hold_out(data, config.held_out)
    held_out = load_data(dataclasses.replace(config.train.data, data=str(config.validation)), device)
    if held_out.shape != data.shape or held_out.num_classes > data.num_classes:
        raise DataError(
            f"--validation {config.validation} has samples of {held_out.shape} in {held_out.num_classes} classes; "
            f"--data has {data.shape} in {data.num_classes}"
        )
    return data, held_out


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
        if trainer.teacher is not None:
            mark["teacher"] = trainer.teacher.name
            if number > 0:
                mark["teacher_share"] = trainer.teacher_clock.share
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
        trainer.teacher_clock = TeacherClock(trainer.device)
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
            f"{model.model}{own}; {len(self.train_set)} samples of {self.train_set.shape} from {train.data.data}; "
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


def measure_memory(config: CompareConfig, run: TrainConfig) -> int | None:
    """Bytes that training takes at its peak, in a new process: in this one, what others left would hide it.

    Returns:
        None where it cannot be told: without /proc, or when the process was killed.
    """
    run = dataclasses.replace(run, threads=run.threads or torch.get_num_threads())
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_peak_memory, config, run).result()
        except BrokenProcessPool as error:
            logger.warning("the memory of a method could not be measured: %s", error)
            return None


def _peak_memory(config: CompareConfig, run: TrainConfig) -> int | None:
    device = resolve_device(run.device)
    data, _ = load_sets(config, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        Trainer(run, data).advance(_MEMORY_STEPS)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading the data
        before = _resident("VmRSS")
        Trainer(run, data).advance(_MEMORY_STEPS)
        return _resident("VmHWM") - before
    except OSError:
        return None


def _resident(entry: str) -> int:
    """An entry of this process's status in bytes. (`getrusage` starts from the peak of the process that forked it.)"""
    found = re.search(rf"^{entry}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {entry}")
    return 1024 * int(found[1])


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


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, value in before.items():
        if isinstance(value, dict):
            yield from _differences(value, now[name])
        elif value != now[name]:
            yield f"--{name.replace('_', '-')} was {value}, now {now[name]}"


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
