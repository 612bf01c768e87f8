"""`layersync export`."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ...errors import ConfigError
from ..checkpoints.card import model_card
from ..checkpoints.export import CARD, DTYPES, Record, is_card, write_card, write_diffusers, write_safetensors
from ..checkpoints.local import run_of, stems
from ..checkpoints.state import read_run_state
from ..checkpoints.weights import find_weights
from ..config import require
from ..config.io import load_config
from ..config.run import CONFIG, OfRun
from ..console import start_logging
from ..sampling.load import load_trained
from .arguments import parse

_WEIGHTS = re.compile(r"model|ema(-[\w.]+)?")


@dataclass(frozen=True)
class ExportCommand(OfRun):
    """Write the weights of a run for others, with what they are: `layersync sample` needs nothing else."""

    out: Path | None = None
    """File to write, FILE.safetensors; with --format diffusers a folder."""
    which: str = "ema"
    """The averaged weights, or the last ones: ema | model | ema-DECAY of a run with several averages."""
    format: Literal["safetensors", "diffusers"] = "safetensors"
    """safetensors: one file, with the names of the published SiT; diffusers: a folder whose transformer/ is a
    DiTTransformer2DModel, of class-conditional models of square samples."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights."""
    card: bool = False
    """Also write a model card, README.md, beside the file; a folder always has one."""
    overwrite: bool = False
    """Replace what an earlier export wrote there."""


def export(command: ExportCommand) -> Path:
    """Writes what `command` asks for and returns where it is.

    Raises:
        UserError: anything wrong with the run, the settings or the place.
    """
    if command.out is None:
        raise ConfigError("--out: name the file to write, such as model.safetensors")
    checkpoint = find_weights(command.source)
    run = run_of(checkpoint) if checkpoint.is_dir() else None
    if run is None:
        raise ConfigError(f"{command.source} is no run and no checkpoint of one, which say what the weights are")
    there = [stem for stem in stems(checkpoint) if _WEIGHTS.fullmatch(stem)]
    require(command.which in there, f"--which {command.which}: {checkpoint} has: {', '.join(there) or 'no weights'}")
    config, state = load_config(run / CONFIG), read_run_state(checkpoint)
    name = config.data.data
    record = Record(
        version=sys.modules[__name__.partition(".")[0]].__version__,  # of what imports this
        which=command.which,
        step=state.step,
        samples_seen=state.samples_seen,
        dataset=Path(name).name if Path(name).is_absolute() else name,
        model=dataclasses.replace(config.model, init=None, recompute="none"),
        data=state.data,
        transport=config.transport,
        sampling=config.sampling,
        layersync=config.layersync,
    )
    model = load_trained(checkpoint, which=command.which).model
    out, dtype = command.out, DTYPES[command.dtype]
    card = model_card(record, model, out.name, diffusers=command.format == "diffusers")
    if command.format == "diffusers":
        return write_diffusers(out, model, record, card, dtype=dtype, overwrite=command.overwrite)
    require(out.suffix == ".safetensors", f"--out {out}: expected a name that ends in .safetensors")
    readme = out.parent / CARD
    require(
        not (command.card and readme.exists() and not (command.overwrite and is_card(readme))),
        f"--card: {readme} exists; write into another folder"
        + (", or give --overwrite" if is_card(readme) else "; it is no card, and --overwrite does not replace it"),
    )
    write_safetensors(out, model, record, dtype=dtype, overwrite=command.overwrite)
    if command.card:
        write_card(readme, card)
    return out


def export_main(argv: Sequence[str]) -> int:
    """`layersync export`."""
    start_logging()
    written = export(parse(ExportCommand, argv, default=ExportCommand(source=tyro.MISSING), command="export"))
    print(f"{written}: draw with: layersync sample {written}")
    return 0
