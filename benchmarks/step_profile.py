"""Where the time of an optimiser step goes on a card: `python benchmarks/step_profile.py OUT.json [PROVIDER ...]`.

For each provider of `layersync bench trainer` the same SiT-XL/2 at batch 64: images/s, what the host takes to launch a
step, the sum of its kernels, the peak of memory, and each kernel's milliseconds and launches in a step.
"""

from __future__ import annotations

import collections
import json
import sys
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from layersync_kernels.bench.throughput import TRAINERS, latents, provider_config
from layersync_kernels.sit.config.model import ModelConfig
from layersync_kernels.sit.config.optim import OptimConfig
from layersync_kernels.sit.config.run import TrainConfig
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.training.loop import Trainer

BATCH, STEPS, PROFILED = 64, 6, 2


def measure(provider: str, data: MemorySet) -> dict[str, object]:
    """Figures of a provider; `kernels` maps a name to (milliseconds, launches), the longest first."""
    config = TrainConfig(model=ModelConfig(model="SiT-XL/2"), optim=OptimConfig(batch_size=BATCH), device="cuda")
    trainer = TRAINERS.get(provider, Trainer)(provider_config(config, provider), data)
    batches = trainer.batches()
    for _ in range(3):
        trainer.step(next(batches))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(STEPS):
        trainer.step(next(batches))
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / STEPS
    began = time.perf_counter()
    trainer.step(next(batches))
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            trainer.step(next(batches))
        torch.cuda.synchronize()
    times: collections.Counter[str] = collections.Counter()
    launches: collections.Counter[str] = collections.Counter()
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA:
            times[event.name] += event.device_time_total / 1e3 / PROFILED
            launches[event.name] += 1
    kernels = {name: (round(ms, 3), launches[name] / PROFILED) for name, ms in times.most_common()}
    return {
        "images_per_s": BATCH / seconds, "ms": 1e3 * seconds, "host_ms": 1e3 * host, "busy": sum(times.values()),
        "peak_gb": peak / 1e9, "kernels": kernels,
    }  # fmt: skip


def main() -> None:
    """Measure and write after each provider."""
    if len(sys.argv) < 2 or not torch.cuda.is_available():
        raise SystemExit(f"{__doc__}\nneeds an NVIDIA card: {torch.cuda.is_available()=}")
    out, providers = Path(sys.argv[1]), sys.argv[2:] or ["fused", "off", "applied", "compile", "eager"]
    data = latents(BATCH, torch.device("cuda"))
    found: dict[str, object] = {}
    for provider in providers:
        found[provider] = figures = measure(provider, data)
        torch.cuda.empty_cache()
        print(provider, *(f"{k} {v:.1f}" for k, v in figures.items() if isinstance(v, float)), flush=True)
        out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
