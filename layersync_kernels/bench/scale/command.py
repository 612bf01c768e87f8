"""`layersync scale`: a paper model of a training step on many GPUs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from rich.console import Console

from ...compiler.cards import Card, find_card
from ...sit.config import at_least, positive, require
from ...sit.models.flops import training_flops
from ...sit.models.sit import SiT
from ..machine import machine_facts
from ..report import append_json
from ..traffic import LATENT, PRECISIONS
from .count import Counts, count, network, side_of, units_of
from .inputs import Inputs
from .links import FABRICS, Link, Storage, find_link, find_storage
from .model import ASSUMPTIONS, Estimate, estimate
from .tables import print_tables

MEASURED_MFU = 0.456
"""Of a whole step of SiT-XL/2 on one H100, batch 64, bf16 (docs/h100.md), as the trainer reckons it: the flops of three
forward passes over the 798 TFLOP/s that a product of bf16 matrices was seen to reach."""
_BATCH = 64
_BYTES = {"bf16": 2, "fp32": 4}


@dataclass
class ScaleConfig:
    """Model a training step of a SiT on many GPUs, on paper: memory, time, communication, checkpoints, data. From
    counted flops and bytes, and from rates that data sheets state. Nothing is run, and what it says is no measurement;
    what you have measured takes the place of an assumption by --step-ms, --link-intra, --link-inter and --storage-gbs.
    See docs/scale.md.
    """

    model: str = "SiT-XL/2"
    """Whose step it is, on latents of 4 channels."""
    gpus: tuple[int, ...] = (1, 8, 64, 1024)
    """Numbers of GPUs."""
    gpus_per_node: int = 8
    """In each node."""
    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: every GPU has everything. fsdp: each has its share. hsdp: shares inside of a node, copies between nodes."""
    batch_per_gpu: int | None = None
    """Samples of a GPU in a step; by default 64."""
    batch_size: int | None = None
    """Samples of all GPUs in a step, in its place."""
    image_size: int = LATENT[1]
    """Side of the latents: an eighth of that of the images."""
    tokens: int | None = None
    """Tokens of a sample, in its place; a square number."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of matrix products (bf16 is autocast), and of parameters on the wire."""
    gradients: Literal["bf16", "fp32"] = "fp32"
    """Of gradients on the wire: fp32 is what the trainer sums, and DDP under autocast unless a hook compresses."""
    card: str = "h100"
    """h100, a100, h200 or b200."""
    mfu: float | None = None
    """Share of the card's matrix rate that a step of one GPU reaches, the update included; by default 0.456, measured
    of SiT-XL/2 at batch 64 on an H100 and an assumption for all else. The passes take no less than counted bytes and
    flops do at full rates."""
    step_ms: float | None = None
    """A measured step of one GPU with --batch-per-gpu, the update included, in place of the modelled one."""
    link_intra: str | None = None
    """Inside of a node: a link by name, or GB/s that a GPU sends while it receives as much; by default NVLink of the
    card."""
    link_inter: str | None = None
    """Between nodes, likewise; each GPU has one. By default InfiniBand as in NVIDIA's systems with that card."""
    latency_intra: float | None = None
    """Microseconds of a step from GPU to GPU, in place of those known of the link."""
    latency_inter: float | None = None
    """Likewise between nodes."""
    overlap: float = 1.0
    """Share of the communication that hides behind compute, of what can: 1 is the best case, 0 the worst."""
    reshard: bool = True
    """fsdp, hsdp: drop gathered parameters after the forward pass, and gather them again."""
    bucket_mb: float = 25.0
    """ddp: MiB of fp32 gradients that are summed at a time."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints, which hold weights, averages and the optimiser's states."""
    storage_gbs: str = "nvme"
    """Where they go: nvme, object, or GB/s that a node writes."""
    writer_gbs: float = 1.1
    """GB/s that a process writes; by default what SHA-256 hashes on one core, as the trainer does with every file."""
    bytes_per_sample: float | None = None
    """Of the data; by default mean and standard deviation of latents in fp16, as `layersync latents` writes them."""
    ema_copies: int = 1
    """Moving averages of the weights."""
    optimizer_states: int = 2
    """fp32 numbers that the optimiser keeps of each parameter: AdamW has two."""
    json: Path | None = None
    """Append a line of JSON for each number of GPUs, inputs included."""


class Scenario(NamedTuple):
    """A number of GPUs, and what the model says of it.

    Attributes:
        inputs: of the model.
        result: of the model.
        timed: where the time of one GPU is from.
    """

    inputs: Inputs
    result: Estimate
    timed: str


def update_ms(trained: int, card: Card, *, optimizer_states: int, ema_copies: int) -> float:
    """Milliseconds of the optimiser and the averages, from their bytes at the card's bandwidth.

    A fused AdamW reads parameter, gradient and states and writes all but the gradient; an average reads itself and the
    parameter and writes itself.
    """
    numbers = 3 + 2 * optimizer_states + 3 * ema_copies
    return 4 * numbers * trained / card.terabytes_per_s / 1e9


def passes_ms(
    config: ScaleConfig, card: Card, model: SiT, batch: int, counts: Counts, update: float
) -> tuple[float, str]:
    """Milliseconds of forward and backward pass of one GPU, and where they are from.

    Raises:
        ConfigError: a measured step that is no longer than its update.
    """
    if config.step_ms is not None:
        require(
            config.step_ms > update,
            f"--step-ms {config.step_ms}: the update alone takes {update:.1f} ms at {card.terabytes_per_s:g} TB/s; "
            "expected the milliseconds of a whole step",
        )
        return config.step_ms - update, "--step-ms, as given"
    mfu = MEASURED_MFU if config.mfu is None else config.mfu
    peak = card.teraflops[PRECISIONS[config.precision] or torch.float32]
    passes = batch * training_flops(model) / (mfu * peak) / 1e9 - update
    if passes < counts.roofline_ms:
        return counts.roofline_ms, "counted bytes and flops at full rates, which take longer than the MFU has it"
    said = "measured of SiT-XL/2 at batch 64 on an H100" if config.mfu is None else "as given"
    return passes, f"MFU {mfu:g} of {peak:g} TFLOP/s, {said}"


def scenarios(config: ScaleConfig) -> list[Scenario]:
    """Everything for each number of GPUs.

    Raises:
        UserError: unknown names, numbers out of range, or that do not go together.
    """
    card = find_card(config.card)
    _check(config)
    side = config.image_size if config.tokens is None else side_of(config.model, config.tokens)
    model = network(config.model, side)
    intra, inter = _links(config)
    storage = find_storage(config.storage_gbs)
    return [_scenario(config, card, model, side, intra, inter, storage, gpus) for gpus in config.gpus]


def _check(config: ScaleConfig) -> None:
    require(bool(config.gpus), "--gpus: expected at least one number of GPUs")
    require(
        config.batch_size is None or config.batch_per_gpu is None,
        "--batch-size and --batch-per-gpu are two ways to say the same: give one",
    )
    require(
        config.batch_size is None or config.step_ms is None,
        "--step-ms was measured with one batch on a GPU: give that as --batch-per-gpu in place of --batch-size",
    )
    at_least(1, batch_per_gpu=config.batch_per_gpu, batch_size=config.batch_size, image_size=config.image_size)
    for gpus in config.gpus:
        at_least(1, gpus=gpus)
        require(
            config.batch_size is None or config.batch_size % gpus == 0,
            f"--batch-size {config.batch_size} does not divide by --gpus {gpus}",
        )
    positive(mfu=config.mfu, step_ms=config.step_ms)
    require(config.mfu is None or config.mfu <= 1, f"--mfu {config.mfu}: expected a share from 0 to 1")
    require(
        config.mfu is None or config.step_ms is None, "--mfu and --step-ms both say how long a step takes: give one"
    )


def _links(config: ScaleConfig) -> tuple[Link, Link]:
    fabric = FABRICS[config.card.lower()]
    return (
        find_link(config.link_intra or fabric.intra, config.latency_intra, like=fabric.intra),
        find_link(config.link_inter or fabric.inter, config.latency_inter, like=fabric.inter),
    )


def _scenario(
    config: ScaleConfig, card: Card, model: SiT, side: int, intra: Link, inter: Link, storage: Storage, gpus: int
) -> Scenario:
    batch = config.batch_per_gpu or _BATCH
    if config.batch_size is not None:
        batch = config.batch_size // gpus
    units = units_of(model)
    counts = count(config.model, side, batch, config.precision, card.name)
    trained = sum(unit.trained for unit in units)
    update = update_ms(trained, card, optimizer_states=config.optimizer_states, ema_copies=config.ema_copies)
    passes, timed = passes_ms(config, card, model, batch, counts, update)
    per_sample = config.bytes_per_sample
    inputs = Inputs(
        gpus=gpus,
        gpus_per_node=config.gpus_per_node,
        strategy=config.strategy,
        units=units,
        batch=batch,
        forward_ms=passes / 3,
        backward_ms=2 * passes / 3,
        update_ms=update,
        intra=intra,
        inter=inter,
        parameter_bytes=_BYTES[config.precision],
        gradient_bytes=_BYTES[config.gradients],
        copy_bytes=counts.copy_bytes,
        activation_bytes=counts.activation_bytes,
        optimizer_states=config.optimizer_states,
        ema_copies=config.ema_copies,
        overlap=config.overlap,
        reshard=config.reshard,
        bucket_mb=config.bucket_mb,
        checkpoint_every=config.checkpoint_every,
        storage_gbs=storage.gigabytes_per_s,
        writer_gbs=config.writer_gbs,
        bytes_per_sample=2 * 2 * math.prod(model.spec.shape) if per_sample is None else per_sample,
    )
    return Scenario(inputs, estimate(inputs), timed)


def row_of(scenario: Scenario, config: ScaleConfig, links: Sequence[str]) -> dict[str, Any]:
    """A scenario as JSON; `Inputs.from_json` and `Estimate.from_json` read its halves."""
    inputs, result, timed = scenario
    return {
        "op": "scale",
        "case": f"{config.model} {inputs.strategy} {inputs.gpus}x{inputs.batch}, {config.precision}",
        "device": config.card.lower(),
        "prediction": True,
        "inputs": dataclasses.asdict(inputs),
        "estimate": dataclasses.asdict(result),
        "sources": {"time of one GPU": timed, "links": list(links)},
        "assumptions": list(ASSUMPTIONS),
        "machine": machine_facts("cpu"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Model, print and write."""
    config = tyro.cli(ScaleConfig, prog="layersync scale", args=argv)
    console = Console()
    found = scenarios(config)
    card, storage = find_card(config.card), find_storage(config.storage_gbs)
    inputs = found[0].inputs
    console.print(
        f"{config.model}, {inputs.parameters / 1e6:.1f} M parameters, {config.strategy}, {config.precision}, on "
        f"{card.title}: a model on paper, no measurement",
        highlight=False,
    )
    print_tables([(own.inputs, own.result) for own in found], card, console)
    links = [
        f"{where}: {link.name}, {link.gigabytes_per_s:g} GB/s ({link.source}), {link.microseconds:g} µs "
        f"({link.latency_source})"
        for where, link in (("inside of a node", inputs.intra), ("between nodes", inputs.inter))
    ]
    console.print("Inputs:", highlight=False)
    for timed in dict.fromkeys(own.timed for own in found):
        console.print(f"- time of one GPU: {timed}", highlight=False)
    console.print(
        f"- update: its bytes at {card.terabytes_per_s:g} TB/s; rates of the card: {card.source}", highlight=False
    )
    for line in (*links, f"storage: {storage.name}, {storage.gigabytes_per_s:g} GB/s of a node ({storage.source})"):
        console.print(f"- {line}", highlight=False)
    console.print("Assumptions:", highlight=False)
    for assumption in ASSUMPTIONS:
        console.print(f"- {assumption}", highlight=False)
    if config.json is not None:
        append_json([row_of(own, config, links) for own in found], config.json)
    return 0
