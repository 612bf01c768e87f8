"""The subcommands of `layersync` that concern the trainer."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import tyro
from rich.logging import RichHandler
from rich.table import Table

from ..errors import ConfigError
from .build import resolve_device, resolve_precision
from .checkpoint import list_checkpoints, run_of
from .compare import SETTINGS, CompareCommand, CompareConfig, compare
from .config import (
    CONFIG,
    SAMPLES,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    TrainConfig,
    load_config,
    load_settings,
)
from .data import load_data
from .probe import ProbeCommand, probe
from .runlog import CURVES, console
from .sample import SampleCommand, sample
from .teacher import compute_features, load_teacher
from .throughput import measure_throughput, provider_config
from .train import Outcome, Trainer, check_run, start_run

C = TypeVar("C")
R = TypeVar("R", SampleCommand, ProbeCommand)

# Flags without the names of their groups: --lr, not --config.optim.lr.
_FLAT = (tyro.conf.OmitArgPrefixes,)
RUN_SETTINGS = ("data", "transport", "sampling")
INTERRUPTED = 130


@dataclass(frozen=True)
class TrainCommand:
    """Train a SiT. Everything goes to the folder --out: config, log, checkpoints, sample grids, loss curves."""

    config: TrainConfig = field(default_factory=TrainConfig)
    out: Path = Path("runs/sit")
    """Folder of the run."""
    resume: bool = False
    """Go on from the newest checkpoint in --out, with its config; flags given now override it."""
    overwrite: bool = False
    """Delete the run in --out first."""


@dataclass(frozen=True)
class DemoCommand:
    """Train a small SiT on real digits for a few minutes, sample from it and compare the speed of the losses."""

    config: TrainConfig = field(default_factory=lambda: demo_config())
    out: Path = Path("runs/demo")
    """Folder of the run."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    overwrite: bool = True
    """Delete the run of an earlier demo in --out first."""


def demo_config() -> TrainConfig:
    """Settings with which two CPU cores learn to draw recognisable digits in five minutes.

    On this budget steps count: a small model, small batches and a high rate. Velocity loss on fixed noise and times
    after 150 CPU seconds: width 96 0.300; width 128 0.317, with batches of 32 0.333, and at half the rate too 0.354.
    Depth 4 gets lower still (0.287), yet what depth 6 draws looks better.
    """
    return TrainConfig(
        data=DataConfig(data="mnist", image_size=14),
        model=ModelConfig(model="SiT-P/2", hidden_size=96, num_heads=3),
        optim=OptimConfig(
            steps=20_000,
            max_seconds=300.0,
            batch_size=16,
            lr=4e-3,
            lr_schedule="cosine",
            warmup_steps=100,
            betas=(0.9, 0.99),
            clip_norm=1.0,
            ema_decay=0.995,
            ema_warmup=True,
        ),
        sampling=SamplingConfig(solver="heun", sampling_steps=25, cfg_scale=2.0),
        log=LogConfig(log_every=50, sample_every=1500, checkpoint_every=1500),
        precision="fp32",  # bf16 is no faster at this width
    )


def parse(kind: type[C], argv: Sequence[str], *, default: C, command: str) -> C:
    """Reads flags over `default`; --help and wrong flags end the process, as is usual."""
    return tyro.cli(kind, args=list(argv), default=default, prog=f"layersync {command}", config=_FLAT)


def start_logging() -> None:
    """Sends the package's messages to the terminal, above the progress bar."""
    logger = logging.getLogger("layersync_kernels")
    if not logger.handlers:
        logger.addHandler(RichHandler(console=console, show_path=False, show_time=False))
        logger.setLevel(logging.INFO)


def peek_out(argv: Sequence[str], default: Path) -> tuple[Path, bool]:
    """--out and --resume, which decide about the defaults of all other flags."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--out", type=Path, default=default)
    peek.add_argument("--resume", action="store_true")
    known, _ = peek.parse_known_args(list(argv))
    return known.out, known.resume


def train_main(argv: Sequence[str]) -> int:
    """`layersync train`."""
    start_logging()
    default = TrainCommand()
    out, resume = peek_out(argv, default.out)
    if resume and (out / CONFIG).is_file():
        default = dataclasses.replace(default, config=load_config(out / CONFIG))
    command = parse(TrainCommand, argv, default=default, command="train")
    outcome = run_training(command.config, command.out, resume=command.resume, overwrite=command.overwrite)
    return INTERRUPTED if outcome.ended == "interrupted" else 0


def run_training(config: TrainConfig, out: Path, *, resume: bool = False, overwrite: bool = False) -> Outcome:
    """Trains in the folder `out` and says where everything is.

    Raises:
        UserError: whatever can be put right: settings, data, folders, a full disk, a loss that is not finite.
    """
    check_run(out, resume=resume, overwrite=overwrite)
    # The trainer before the folder: settings that do not work must neither make a folder nor empty one.
    trainer = Trainer(config, run_dir=out)
    if resume and (checkpoints := list_checkpoints(out)):
        trainer.load(checkpoints[-1])
        console.print(f"resuming {out} at step {trainer.steps_done}")
        if trainer.fraction >= 1:
            raise ConfigError(f"{out} is finished at step {trainer.steps_done}; give more --steps or --max-seconds")
    start_run(out, config, overwrite=overwrite)
    if trainer.data.broken:
        (out / "broken_files.txt").write_text("".join(f"{n}\t{r}\n" for n, r in trainer.data.broken.items()))
    pairs = "off" if trainer.alignment is None else trainer.alignment.extra_repr()
    teacher = "" if trainer.repa is None else f"; {config.align.align} {trainer.repa.extra_repr()}"
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    console.print(
        f"{config.model.model}, {parameters:.1f} M parameters, {len(trainer.data)} samples of {trainer.data.shape}, "
        f"{trainer.device}, {trainer.autocast_dtype or 'fp32'}; LayerSync {pairs}{teacher}"
    )
    outcome = trainer.fit()
    if trainer.teacher is not None and (share := outcome.metrics.get("teacher_share")) is not None:
        what = "its precomputed features" if config.align.features else "running it"
        console.print(f"the teacher {trainer.teacher.name} took {share:.1%} of a step ({what})")
    if outcome.ended == "interrupted":
        console.print(f"stopped and saved at step {outcome.step}; go on with: layersync train --out {out} --resume")
    else:
        console.print(f"done: step {outcome.step} after {outcome.seconds:.0f} s; draw with: layersync sample {out}")
    return outcome


def parse_of_run(kind: type[R], argv: Sequence[str], *, command: str) -> R:
    """Reads the flags of a command about a trained model; the settings of its run are the defaults, below the flags."""
    default = kind(source=tyro.MISSING)
    run = run_of(parse(kind, argv, default=default, command=command).source)
    if run is not None:
        config = load_config(run / CONFIG)
        own = {f.name: getattr(config, f.name) for f in dataclasses.fields(kind) if f.name in RUN_SETTINGS}
        default = dataclasses.replace(default, **own)
    return parse(kind, argv, default=default, command=command)


@dataclass(frozen=True)
class FeaturesCommand:
    """Run a teacher over a data set once. Its features, for `layersync train --features`, go to the file --out."""

    teacher: str = "efficientnet-lite0"
    """efficientnet-lite0 | dinov2-vits14, -vitb14, -vitl14 | timm/NAME | hub/REPO:NAME | hub/FOLDER:NAME."""
    out: Path = Path("features.safetensors")
    """The file to write: fp16, N x tokens x channels; twice that with --flip, for the mirrored images."""
    data: DataConfig = field(default_factory=DataConfig)
    grid: int | None = None
    """Tokens per side, where the teacher can: as many as the model to be trained has. Others are interpolated."""
    teacher_size: int | None = None
    """Side of the teacher's images in pixels."""
    teacher_weights: Path | None = None
    """Read the teacher's weights from this file instead of downloading them."""
    batch_size: int = 64
    """Images at a time."""
    device: str = "auto"
    """auto: cuda if there is one, else cpu."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto: bf16 where the device is faster with it, else fp32."""


def features_main(argv: Sequence[str]) -> int:
    """`layersync features`."""
    start_logging()
    command = parse(FeaturesCommand, argv, default=FeaturesCommand(), command="features")
    if command.batch_size < 1:
        raise ConfigError(f"--batch-size {command.batch_size}: expected at least 1")
    device = resolve_device(command.device)
    data = load_data(command.data, device)
    teacher = load_teacher(
        command.teacher, size=command.teacher_size, grid=command.grid, weights=command.teacher_weights
    )
    shape = compute_features(
        teacher.to(device),
        data,
        command.out,
        source=command.data.data,
        flip=command.data.flip,
        batch_size=command.batch_size,
        autocast_dtype=resolve_precision(command.precision, device),
    )
    print(f"{command.out}: {' x '.join(map(str, shape))} features of {teacher.name}")
    return 0


def sample_main(argv: Sequence[str]) -> int:
    """`layersync sample`."""
    start_logging()
    print(sample(parse_of_run(SampleCommand, argv, command="sample")))
    return 0


def probe_main(argv: Sequence[str]) -> int:
    """`layersync probe`."""
    start_logging()
    print(probe(parse_of_run(ProbeCommand, argv, command="probe")))
    return 0


def compare_main(argv: Sequence[str]) -> int:
    """`layersync compare`."""
    start_logging()
    default = CompareCommand()
    out, resume = peek_out(argv, default.out)
    if resume and (out / SETTINGS).is_file():
        default = dataclasses.replace(default, comparison=load_settings(out / SETTINGS, CompareConfig))
    report = compare(parse(CompareCommand, argv, default=default, command="compare"))
    if report is None:
        return INTERRUPTED
    print(report)
    return 0


def demo_main(argv: Sequence[str]) -> int:
    """`layersync demo`."""
    start_logging()
    began = time.monotonic()
    command = parse(DemoCommand, argv, default=DemoCommand(), command="demo")
    out = command.out
    outcome = run_training(
        command.config, out, resume=command.resume, overwrite=command.overwrite and not command.resume
    )
    if outcome.ended == "interrupted":
        return INTERRUPTED
    grid = sample(SampleCommand(out, sampling=command.config.sampling, transport=command.config.transport))
    console.print("timing the trainer's step ...")
    configs = {name: provider_config(command.config, name) for name in ("fused", "off", "eager")}
    rates = measure_throughput(configs, steps=5, rounds=30, warmup=3, max_seconds=30)
    table = Table("blocks and loss", "images/s", "slowest to fastest round", "against eager")
    meaning = {
        "fused": "fused, LayerSync",
        "off": "fused, no LayerSync",
        "eager": "eager PyTorch, LayerSync",
    }
    for name, rate in rates.items():
        spread = f"{min(rate.rounds):.0f} to {max(rate.rounds):.0f}"
        table.add_row(meaning[name], f"{rate.median:.0f}", spread, f"{rate.over(rates['eager']):.3f}x")
    console.print(table)
    print(f"samples, one row per class: {grid}")
    print(f"loss and cosine curves:     {out / CURVES}")
    print(f"grids while it learned:     {out / SAMPLES}")
    print(f"checkpoints and log:        {out}")
    print(f"{outcome.step} steps in {outcome.seconds:.0f} s of training, {time.monotonic() - began:.0f} s in all")
    return 0
