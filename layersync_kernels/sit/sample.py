"""Drawing samples from a trained SiT."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .build import build_model, build_transport, resolve_device, resolve_precision
from .checkpoint import Weights, atomic_path, fill_model, find_weights, load_weights, read_state, run_of
from .config import CONFIG, SAMPLES, SamplingConfig, TransportConfig, load_config
from .model import SiT, sit_models
from .plots import save_grid
from .transport import Sampler, Transport


@dataclass(frozen=True)
class SampleCommand:
    """Draw a grid of samples, one row per class, with the averaged weights."""

    source: tyro.conf.Positional[Path]
    """A run, a checkpoint folder, a .safetensors file or a published .pt."""
    out: Path | None = None
    """The picture; default: samples/grid.png in the run, or beside the file."""
    classes: tuple[int, ...] = ()
    """Rows; default: the first ten."""
    per_class: int = 8
    """Samples per row."""
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    weights: Literal["ema", "model"] = "ema"
    """The averaged weights or the last ones."""
    array: Path | None = None
    """Also write the samples as .npz: "samples" float32 (N, C, H, W), "labels" int64 (N,)."""
    batch_size: int = 256
    """Samples drawn at once."""
    num_heads: int | None = None
    """Attention heads, for a lone file of unusual size: weights do not tell them."""
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


@dataclass
class Trained:
    """A model ready to draw from."""

    model: SiT
    shape: tuple[int, int, int]
    num_classes: int
    latent: bool


def draw(
    model: SiT,
    transport: Transport,
    sampling: SamplingConfig,
    labels: Tensor,
    *,
    seed: int,
    autocast_dtype: torch.dtype | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Draws one sample per label; a seed gives the same noise on every device, and leaves the global generators alone.

    Args:
        model: in evaluation mode.
        transport: the one that the model was trained with.
        sampling: solver and guidance.
        labels: int64 (N,), on the model's device.
        seed: of the noise.
        autocast_dtype: None for fp32.
        batch_size: samples drawn at once.

    Returns:
        float32 (N, C, H, W).

    Raises:
        ConfigError: sampler settings that do not exist, or guidance from a model without a null label.
    """
    guided = sampling.cfg_scale != 1.0
    if guided and model.y_embedder.dropout_prob == 0:
        raise ConfigError("--cfg-scale needs a model that was trained with --class-dropout above 0")
    # Another seed than that of the starting noise, or the first step of an SDE would add the same noise again.
    generator = torch.Generator(labels.device).manual_seed(seed + 2**31)  # a CPU generator takes 32 bits
    sampler = Sampler(transport)
    try:
        if sampling.sampler == "ode":
            solve = sampler.sample_ode(sampling_method=sampling.solver, num_steps=sampling.sampling_steps)
        else:
            solve = sampler.sample_sde(
                sampling_method=sampling.solver,
                num_steps=sampling.sampling_steps,
                diffusion_form=sampling.diffusion_form,
                diffusion_norm=sampling.diffusion_norm,
                generator=generator,
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    shape = (model.in_channels, model.input_size, model.input_size)
    noise = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    interval = None if sampling.guidance_interval == (0.0, 1.0) else sampling.guidance_interval
    drawn = []
    with torch.autocast(labels.device.type, autocast_dtype, enabled=autocast_dtype is not None):
        for z, y in zip(noise.split(batch_size), labels.split(batch_size), strict=True):
            if guided:
                both = solve(
                    torch.cat([z, z]),
                    model.forward_with_cfg,
                    y=torch.cat([y, torch.full_like(y, model.num_classes)]),
                    cfg_scale=sampling.cfg_scale,
                    guidance_interval=interval,
                )
                drawn.append(both[: len(z)])
            else:
                drawn.append(solve(z, model, y=y))
    return torch.cat(drawn).float()


def load_trained(path: Path, *, ema: bool = True, num_heads: int | None = None) -> Trained:
    """The model of a run or checkpoint, on the CPU in evaluation mode.

    A run says what its model is; for a lone file the sizes are read from the shapes of its tensors.

    Raises:
        CheckpointError: damaged, foreign, or of a size whose number of heads is not known; names the file.
    """
    found = find_weights(path)
    weights = load_weights(found, ema=ema)
    run = run_of(found) if found.is_dir() else None
    if run is None:
        model = _model_from_shapes(weights, num_heads)
        shape, latent = (model.in_channels, model.input_size, model.input_size), model.in_channels == 4
    else:
        state = read_state(found)
        try:
            channels, height, width = state["data"]["shape"]
            shape, latent = (channels, height, width), bool(state["data"]["latent"])
            num_classes = int(state["data"]["num_classes"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{found / 'state.json'} does not describe the data: {error!r}") from error
        model = build_model(load_config(run / CONFIG).model, shape, num_classes)
    fill_model(model, weights)
    return Trained(model.eval().requires_grad_(False), shape, model.num_classes, latent)


def _model_from_shapes(weights: Weights, num_heads: int | None) -> SiT:
    tensors = weights.tensors
    try:
        hidden_size, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
        tokens = tensors["pos_embed"].shape[1]
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        rows = tensors["y_embedder.embedding_table.weight"].shape[0]
        outputs = tensors["final_layer.linear.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{weights.path} is no SiT checkpoint: {error!r}") from error
    sizes = [made.keywords for made in sit_models.values() if isinstance(made, functools.partial)]
    heads = num_heads or next(
        (s["num_heads"] for s in sizes if (s["hidden_size"], s["depth"]) == (hidden_size, depth)), None
    )
    if heads is None:
        raise CheckpointError(
            f"{weights.path}: a SiT of width {hidden_size} and depth {depth} has no published number of heads; "
            "give --num-heads"
        )
    dropout = 0.0 if weights.args.get("num_classes") == rows else 0.1  # a null label more than classes, unless told
    try:
        return SiT(
            input_size=math.isqrt(tokens) * patch_size,
            patch_size=patch_size,
            in_channels=channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=heads,
            class_dropout_prob=dropout,
            num_classes=rows if dropout == 0 else rows - 1,
            learn_sigma=outputs == 2 * channels * patch_size**2,
        )
    except ValueError as error:
        raise CheckpointError(f"{weights.path}: {error}") from error


def sample(command: SampleCommand) -> Path:
    """Draws the grid that `command` asks for and returns the path of the picture.

    Raises:
        UserError: anything wrong with the checkpoint or the settings.
    """
    command.sampling.validate()
    device = resolve_device(command.device)
    trained = load_trained(command.source, ema=command.weights == "ema", num_heads=command.num_heads)
    classes = command.classes or tuple(range(min(10, trained.num_classes)))
    if not all(0 <= c < trained.num_classes for c in classes):
        raise ConfigError(
            f"--classes {' '.join(map(str, classes))}: the model has classes 0 to {trained.num_classes - 1}"
        )
    for flag, value in {"per-class": command.per_class, "batch-size": command.batch_size}.items():
        if value < 1:
            raise ConfigError(f"--{flag} {value}: expected at least 1")
    labels = torch.tensor(classes).repeat_interleave(command.per_class).to(device)
    samples = draw(
        trained.model.to(device),
        build_transport(command.transport),
        command.sampling,
        labels,
        seed=command.seed,
        autocast_dtype=resolve_precision(command.precision, device),
        batch_size=command.batch_size,
    )
    if not samples.isfinite().all():
        raise CheckpointError(f"{command.source} gives samples that are not finite; its weights may have diverged")
    run = run_of(command.source)
    default = run / SAMPLES / "grid.png" if run else command.source.with_suffix(".png")
    try:
        if command.array is not None:
            with atomic_path(command.array) as temporary, temporary.open("wb") as file:
                np.savez(file, samples=samples.cpu().numpy(), labels=labels.cpu().numpy())
        return save_grid(samples, command.out or default, columns=command.per_class, latent=trained.latent)
    except OSError as error:
        raise CheckpointError(f"cannot write the samples: {error}") from error
