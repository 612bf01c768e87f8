"""What is written before the first step: what is compared, and how the result will be read."""

from __future__ import annotations

from pathlib import Path

import torch

from ...config.run import TrainConfig
from ...data.base import SampleSet
from ...evaluation.metrics import LEVEL
from .arms import Arm
from .config import QUALITIES, CompareConfig
from .pilot import SEEDS, Pilot, power_lines, uncertainty
from .statistics import POWER


def primary(config: CompareConfig) -> str:
    """The quality by which a comparison is read."""
    return "validation_loss" if config.quality_network == "none" else "frechet"


def pairs_of(config: TrainConfig) -> list[str]:
    """The pairs of LayerSync as the config has them, "STUDENT:TEACHER"; none where it is off."""
    own = config.layersync.layersync
    return [] if own == ("off",) else list(own)


def describe(config: CompareConfig, data: SampleSet, device: torch.device, *, held_out: int) -> str:
    """Sentences on what is trained on what."""
    train = config.train
    model, optim = train.model, train.optim
    sizes = {"width": model.hidden_size, "depth": model.depth, "patch": model.patch_size}
    own = "".join(f", {name} {value}" for name, value in sizes.items() if value is not None)
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    limit = "" if optim.max_seconds is None else f", at most {optim.max_seconds:g} s of training"
    return (
        f"{model.model}{own}; {len(data)} samples of {data.spec} from {Path(train.data.data).name}, {held_out} others "
        f"held out; {optim.steps} steps of batches of {optim.batch_size}{limit}, learning rate {optim.lr:g} "
        f"({optim.lr_schedule}); "
        f"{train.precision} precision, {device}{threads}, PyTorch {torch.__version__}."
    )


def arm_lines(arms: list[Arm]) -> list[str]:
    """A line for each arm: what it trains with beside the flow's own loss."""
    return [f"- **{arm.name}**: {'; '.join(_terms(arm.config)) or 'nothing but the flow loss'}" for arm in arms]


def _terms(config: TrainConfig) -> list[str]:
    found = []
    if pairs := pairs_of(config):
        own = config.layersync
        weights = ", ".join(f"{weight:g}" for weight in own.weight)
        found.append(f"LayerSync {', '.join(pairs)}, weight {weights}{_when(own.when)}")
    if (align := config.align).align != "off":
        block = "the default block" if align.align_block is None else f"block {align.align_block}"
        teacher = "" if align.align == "sra" else f" from {align.teacher or align.features}"
        found.append(f"{align.align}{teacher} in {block}, weight {align.align_weight:g}{_when(align.align_when)}")
    if (own_dispersive := config.dispersive).dispersive != "off":
        found.append(
            f"dispersive loss in block {own_dispersive.dispersive}, weight {own_dispersive.dispersive_weight:g}"
            f"{_when(own_dispersive.dispersive_when)}"
        )
    return found


def _when(schedule: object) -> str:
    kind, start, stop, every = (getattr(schedule, name) for name in ("schedule", "start_step", "stop_step", "every"))
    said = "" if kind == "constant" else f", {kind}"
    said += f" from step {start}" if start else ""
    said += f" until step {stop}" if stop is not None else ""
    return said + (f", every {every} steps" if every > 1 else "")


def plan_text(config: CompareConfig, subject: str, pilot: Pilot | None, *, late: bool) -> str:
    """The text of a plan; `late`: there are steps already, as of a comparison that was begun by an earlier version."""
    arms, baseline, quality = config.arms(), config.baseline, QUALITIES[primary(config)]
    others = len(arms) - 1
    when = "Written when steps had been trained already: this is no plan." if late else "Written before the first step."
    lines = ["## The plan", "", when, "", subject, ""]
    lines += arm_lines(arms)
    lines += [
        "",
        f"{config.seeds} seeds of each, from {config.train.seed} on.",
        "",
        f"**How it is read.** One number decides: the {quality} of the averaged weights after equal steps, as its "
        f"difference to {baseline}, seed by seed. An arm is *better* or *worse* where all seeds agree and the "
        f"{LEVEL:.0%} interval of Student's t of the mean difference leaves out 0, with at least two seeds; else the "
        "study *does not tell*. "
        + (
            f"With {others} arms beside {baseline}, by chance alone one of them would come out so in up to "
            f"{1 - LEVEL**others:.0%} of such studies. "
            if others > 1
            else ""
        )
        + "All other numbers describe, and decide nothing.",
        "",
    ]
    if pilot is None:
        return "\n".join([*lines, "No pilot: how small an effect this would find is not known before."]) + "\n"
    lines += [
        f"**What it can find.** A pilot of {SEEDS} other seeds of {pilot.arms[0]} and {pilot.arms[1]}: by how much "
        "their difference moves from seed to seed, in parts of the baseline's value, and how many seeds a study then "
        f"needs to find a relative difference in {POWER:.0%} of all cases. Rough: a deviation of {SEEDS} seeds is too "
        f"small by a factor of {uncertainty():.0f} or more in one case of twenty.",
        "",
        *power_lines(pilot),
    ]
    return "\n".join(lines) + "\n"
