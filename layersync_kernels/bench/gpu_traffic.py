"""`layersync bench traffic --device h100`: a SiT's training step counted on GPU graphs, and its time predicted."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compiler import gpu_code
from ..compiler.cards import Card
from ..compiler.gpu_graph import GROUPS, GpuStep, compose_step, count_gpu_step, mix_order_reduction, obstacle
from ..compiler.roofline import ASSUMPTIONS, predict
from ..modules.block import AdaLNZeroBlock
from ..modules.published import SiTBlock
from ..sit.models.registry import sit_models
from .machine import machine_facts
from .traffic import LATENT, PRECISIONS, Provider, training_step


class GpuProvider(NamedTuple):
    """A way to run the model on a GPU.

    Attributes:
        kernels: as `sit.SiT` takes them; "eager" are the published blocks.
        compiled: through torch.compile.
    """

    kernels: str
    compiled: bool


GPU_PROVIDERS = {
    "eager": GpuProvider("eager", False),
    "compile": GpuProvider("eager", True),
    "fused": GpuProvider("fused", False),
    "fused, compile": GpuProvider("fused", True),
}
"""The published blocks and ours, op by op and through torch.compile."""


class Setting(NamedTuple):
    """What is counted.

    Attributes:
        model: name of `sit.sit_models`.
        batch: images.
        precision: key of `traffic.PRECISIONS`.
        card: whose graphs.
        backend: of our ops.
    """

    model: str
    batch: int
    precision: str
    card: Card
    backend: str = "cuda"

    @property
    def autocast(self) -> torch.dtype | None:
        """Of the precision."""
        return PRECISIONS[self.precision]


# What is counted of a provider, by name: blocks, and which loss. From these everything else is a sum or a difference.
_ALONE = "alone"
_RUNS = {_ALONE: (1, ""), "two": (2, ""), "three": (3, ""), "LayerSync": (3, "aligned"), "REPA": (2, "repa")}


def block_alone(kernels: str, setting: Setting) -> Callable[[], Tensor]:
    """Forward pass of one block on tokens, as torch.compile of each block sees it."""
    network = _network(setting)
    kind = AdaLNZeroBlock if kernels == "fused" else SiTBlock
    block = kind(network.hidden_size, network.num_heads)
    tokens = torch.randn(setting.batch, network.pos_embed.shape[1], network.hidden_size, requires_grad=True)
    condition = torch.randn(setting.batch, network.hidden_size, requires_grad=True)

    def forward() -> Tensor:
        with torch.autocast("cpu", setting.autocast, enabled=setting.autocast is not None):
            return block(tokens, condition)

    return forward


def _network(setting: Setting) -> Any:
    with torch.device("meta"):
        return sit_models[setting.model](input_size=LATENT[1], depth=1)


def _count(setting: Setting, task: tuple[str, str]) -> GpuStep:
    """Count a run of a provider, both by name."""
    name, run = task
    provider, (blocks, loss) = GPU_PROVIDERS[name], _RUNS[run]
    if run == _ALONE:
        make: Callable[[], Callable[[], Tensor]] = functools.partial(block_alone, provider.kernels, setting)
    else:
        step = Provider(provider.kernels, aligned=loss == "aligned", repa=loss == "repa")
        make = functools.partial(training_step, step, setting.model, setting.batch, setting.autocast, blocks)
    return count_gpu_step(make, compiled=provider.compiled, card=setting.card, backend=setting.backend)


def count(setting: Setting, *, quick: bool = False, jobs: int = 1) -> dict[str, dict[str, GpuStep]]:
    """Count every provider that can be counted here.

    Args:
        setting: what.
        quick: one block by itself, and no more.
        jobs: processes; quick takes one.

    Returns:
        provider → part → counts. Parts: "block alone"; and, unless quick, "block", what a block adds to a model that is
        compiled as a whole; "step", the whole step; "LayerSync" and "REPA", what their losses add to a step.
    """
    with torch.device("meta"):
        depth = sit_models[setting.model](input_size=LATENT[1]).depth
    providers = {name: p for name, p in GPU_PROVIDERS.items() if not p.compiled or obstacle() is None}
    tasks = [(name, run) for name in providers for run in ([_ALONE] if quick else _RUNS)]
    tasks.sort(key=lambda task: not providers[task[0]].compiled)  # what takes longest first
    count_task = functools.partial(_count, setting)
    if jobs > 1 and not quick:
        # Not by fork: a child of a process with threads of its own may wait for ever.
        with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            try:
                counted = dict(zip(tasks, pool.map(count_task, tasks), strict=True))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    else:
        counted = dict(zip(tasks, map(count_task, tasks), strict=True))
    return {name: _parts({run: counted[name, run] for n, run in tasks if n == name}, depth) for name in providers}


def _parts(runs: dict[str, GpuStep], depth: int) -> dict[str, GpuStep]:
    parts = {"block alone": runs[_ALONE]}
    if len(runs) > 1:
        block, step = compose_step(runs["two"], runs["three"], depth)
        parts |= {
            "block": block,
            "step": step,
            "LayerSync": runs["LayerSync"] - runs["three"],
            "REPA": runs["REPA"] - runs["two"],
        }
    return parts


def measure(setting: Setting, *, quick: bool = False, jobs: int = 1) -> list[dict[str, Any]]:
    """Count, predict, and read the registers of the kernels of a block.

    Returns:
        a row per provider and part, with the counts of all its kernels and the prediction; one, "registers", with
        registers and spills; one, "facts", with what holds for all: the card and its rates, assumptions, what was
        skipped and why. MD is batch · tokens · width · 4 bytes.
    """
    network = _network(setting)
    md = 4 * setting.batch * network.pos_embed[0].numel()
    counted = count(setting, quick=quick, jobs=jobs)
    common = {
        "op": "gpu_traffic",
        "case": f"{setting.model} batch {setting.batch}, {setting.precision}",
        "device": setting.card.name,
        "md_bytes": md,
    }
    rows = [
        {**common, "provider": name, "part": part, **_facts(step, part, setting)}
        for name, parts in counted.items()
        for part, step in parts.items()
    ]
    resources, skipped = ([], ["registers and spills, for quickness"]) if quick else _resources(counted, setting, md)
    reason = obstacle()
    if reason is not None:
        skipped.insert(0, f"torch.compile is not counted: {reason}")
    facts = {
        "part": "facts",
        "prediction": True,
        "card": setting.card.title,
        "terabytes_per_s": setting.card.terabytes_per_s,
        "teraflops": setting.card.teraflops[setting.autocast or torch.float32],
        "rates_from": setting.card.source,
        "backend": setting.backend,
        "mix_order_reduction": mix_order_reduction(),
        "assumptions": list(ASSUMPTIONS),
        "skipped": skipped,
        "machine": machine_facts("cpu"),
    }
    return [*rows, {**common, "part": "registers", "kernels": resources}, {**common, **facts}]


def _facts(step: GpuStep, part: str, setting: Setting) -> dict[str, Any]:
    prediction = predict(step, setting.card)
    facts: dict[str, Any] = {
        "bytes": step.bytes(),
        "bytes_outside": step.outside,
        "bytes_by_group": {group: step.bytes(group) for group in GROUPS},
        "launches": step.launches(),
        "launches_by_group": {group: step.launches(group) for group in GROUPS},
        "flops": sum(times * kernel.flops for kernel, times in step.kernels.items()),
        "saved_bytes": step.saved_bytes,
        "saved_weight_bytes": step.weight_bytes,
        "predicted_ms": prediction.ms,
        "predicted_ms_by_group": prediction.group_ms,
        "predicted_memory_ms": prediction.memory_ms,
        "predicted_matmul_ms": prediction.matmul_ms,
        "predicted_bound_by": prediction.binds,
        "kernels": [
            {**kernel._asdict(), "dtype": kernel.dtype and str(kernel.dtype).removeprefix("torch."), "times": times}
            for kernel, times in sorted(step.kernels.items(), key=lambda item: -item[0].bytes * item[1])
        ],
    }
    if part == "step":
        facts["predicted_images_per_s"] = 1e3 * setting.batch / prediction.ms
    return facts


def _resources(
    counted: dict[str, dict[str, GpuStep]], setting: Setting, md: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Registers and spills of the larger kernels of a block, and why there are none."""
    reason = gpu_code.obstacle()
    if reason is not None:
        return [], [f"registers and spills are not read: {reason}"]
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for name, parts in counted.items():
        if not GPU_PROVIDERS[name].compiled:
            continue
        step = parts["block alone"]
        large = {kernel for kernel in step.kernels if kernel.bytes > md / 4}
        names = {group: {kernel.name for kernel in large if kernel.group == group} for group in GROUPS}
        found = gpu_code.inductor_resources(step.code, names["other"], setting.card)
        if setting.backend == "cuda" and names["ours"]:
            ours, why = gpu_code.our_resources(names["ours"], setting.autocast or torch.float32, setting.card)
            found += ours
            skipped += [f"registers of our kernels are not read: {why}"] if why else []
        elif names["ours"]:
            skipped.append("registers of our kernels are read for backend cuda only")
        largest = {kernel.name: kernel.bytes for kernel in sorted(large)}
        rows += [{"provider": name, "bytes": largest[r.name], **r._asdict()} for r in found]
    return sorted(rows, key=lambda row: (row["provider"], -row["bytes"])), skipped
