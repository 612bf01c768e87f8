"""A SiT as diffusers' `DiTTransformer2DModel`, and back.

The network is the same; four things differ:

* Names, and that queries, keys and values have a layer each.
* Each block holds a copy of the embedders of time and class, of which all are alike.
* Positions are computed, not stored.
* diffusers spaces the frequencies of the time 10000^(-i/127), DiT and SiT 10000^(-i/128). For times in [0, 1] the one
  set of cosines and sines is a linear map of the other, up to rounding, so that the first layer of the time's MLP can
  be refitted: see `refit_time`. What it was is kept in a file beside the weights, which diffusers does not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ..config.io import parse_json
from ..models.patches import sincos_positions
from ..models.sit import SiT
from .local import read_tensors
from .published import read_published

CLASS = "DiTTransformer2DModel"
TRANSFORMER = "transformer"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
TIME_FILE = "sit_time_embedding.safetensors"
TIME_WEIGHT = "t_embedder.mlp.0.weight"
_PICKLED = "diffusion_pytorch_model.bin"
_PARTS = ("weight", "bias")
_ENDS = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1"}
_ENDS |= {"final_layer.linear": "proj_out_2"}
_BLOCK = {"attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
_BLOCK |= {"adaLN_modulation.1": "norm1.linear"}
_EMBEDDERS = {
    f"t_embedder.mlp.{ours}.{part}": f"norm1.emb.timestep_embedder.linear_{theirs}.{part}"
    for ours, theirs in ((0, 1), (2, 2))
    for part in _PARTS
} | {"y_embedder.embedding_table.weight": "norm1.emb.class_embedder.embedding_table.weight"}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def diffusers_config(model: SiT, *, variable: bool = False) -> dict[str, Any]:
    """What config.json of the same `DiTTransformer2DModel` holds.

    Args:
        model: with its weights.
        variable: whether its samples have lengths.

    Raises:
        ConfigError: diffusers' class cannot express the model; names the setting.
    """
    extent, patch = model.extent, model.patch_size
    reasons = {
        f"samples of {len(extent)} dimension{'s'[: len(extent) > 1]}": len(extent) != 2,
        f"samples of {' x '.join(map(str, extent))}, which are not square": len(set(extent)) > 1,
        f"--patch-size {' '.join(map(str, patch))}, which is not square": len(set(patch)) > 1,
        "samples with lengths": variable,
        f"--positions {model.positions}": model.positions != "sincos",
        f"--condition {model.condition}": model.condition != "class",
        "--class-dropout 0, which leaves no null label": model.condition == "class" and not model.guidable,
    }
    if found := [reason for reason, there in reasons.items() if there]:
        raise ConfigError(
            f"--format diffusers: its {CLASS} has no {'; no '.join(found)}. It takes square samples of two dimensions, "
            "--positions sincos and --condition class with a null label; --format safetensors takes any model"
        )
    positions = sincos_positions(model.hidden_size, model.grid).float()
    if not torch.allclose(model.get_parameter("pos_embed")[0].float().cpu(), positions, atol=1e-4):
        raise ConfigError(
            f"--format diffusers: its {CLASS} computes the positions, and those of the model are others; "
            "--format safetensors takes any model"
        )
    return {
        "_class_name": CLASS,
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "num_layers": model.depth,
        "attention_bias": True,
        "sample_size": extent[0],
        "patch_size": patch[0],
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": model.num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,  # of the second norm; the first and the last have it written into their code
    }


def _pairs(depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name of each parameter of a SiT but its positions, and those of what it becomes: one, three, or one a block."""
    for ours, theirs in _ENDS.items():
        for part in _PARTS:
            yield f"{ours}.{part}", (f"{theirs}.{part}",)
    for ours, theirs in _EMBEDDERS.items():
        yield ours, tuple(f"transformer_blocks.{i}.{theirs}" for i in range(depth))
    for i in range(depth):
        for part in _PARTS:
            yield f"blocks.{i}.attn.qkv.{part}", tuple(f"transformer_blocks.{i}.{name}.{part}" for name in _QKV)
            for ours, theirs in _BLOCK.items():
                yield f"blocks.{i}.{ours}.{part}", (f"transformer_blocks.{i}.{theirs}.{part}",)


def to_diffusers(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The weights of a SiT under the names of diffusers; the time's first layer as it is. None share memory."""
    found: dict[str, Tensor] = {}
    for ours, theirs in _pairs(depth):
        value = tensors[ours]
        parts = value.chunk(3) if ".attn.qkv." in ours else [value] * len(theirs)
        found |= {name: part.clone() for name, part in zip(theirs, parts, strict=True)}
    return found


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a SiT, without positions, from those of a `DiTTransformer2DModel`: `to_diffusers` backwards.

    Raises:
        ValueError: names are missing or left over, or the blocks embed time and class differently.
    """
    depth = 1 + max((int(name.split(".")[1]) for name in tensors if _is_block(name)), default=-1)
    if not 1 <= depth <= len(tensors):
        raise ValueError(f"it names {depth} blocks and has {len(tensors)} tensors")
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for ours, theirs in _pairs(depth):
        if missing := [name for name in theirs if name not in tensors]:
            raise ValueError(f"it lacks {missing[0]}")
        parts = [tensors[name] for name in theirs]
        taken |= set(theirs)
        if ".attn.qkv." in ours:
            found[ours] = torch.cat(parts)
        elif all(torch.equal(part, parts[0]) for part in parts[1:]):
            found[ours] = parts[0]
        else:
            raise ValueError(f"its blocks have different embedders ({theirs[0]} and others), a SiT has one")
    if left := sorted(tensors.keys() - taken):
        raise ValueError(f"it has {left[0]!r:.200}, which a SiT has not")
    return found


def _is_block(name: str) -> bool:
    first, _, rest = name.partition(".")
    return first == "transformer_blocks" and rest.partition(".")[0].isdecimal()


def refit_time(weight: Tensor) -> Tensor:
    """The time's first layer (D, 256) for diffusers' frequencies: the same values at times in [0, 1], and only there.

    All frequencies are at most 1, so that over [0, 1] each cosine and sine is a combination of those at frequencies
    nearby; the one with the least norm is taken, in fp64.
    """
    half = weight.shape[1] // 2
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None]
    bases = []
    for steps in (half - 1, half):
        angle = t * torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10_000) / steps))
        bases.append(torch.cat([angle.cos(), angle.sin()], dim=1))
    theirs, ours = bases
    change = torch.linalg.pinv(theirs, rtol=1e-9) @ ours
    return (weight.double() @ change.T).to(weight.dtype)


def find_diffusers(path: Path) -> Path | None:
    """The file of weights in a folder of diffusers or its transformer/; None: it is none."""
    for folder in (path, path / TRANSFORMER):
        for name in (WEIGHTS_FILE, _PICKLED):
            if (folder / name).is_file() and (folder / CONFIG_FILE).is_file():
                return folder / name
    return None


def is_diffusers(file: Path) -> bool:
    """Whether that is a file which `find_diffusers` gives."""
    return file.name in (WEIGHTS_FILE, _PICKLED) and (file.parent / CONFIG_FILE).is_file()


def read_diffusers(file: Path) -> dict[str, Tensor]:
    """The weights of a SiT from a file that `find_diffusers` gave, positions included.

    Raises:
        CheckpointError: another class, or sizes and names that are not those of a SiT; names the file.
    """
    path = file.with_name(CONFIG_FILE)
    try:
        config = parse_json(path.read_bytes())
        if not isinstance(config, dict) or config.get("_class_name") != CLASS:
            raise ValueError(f"expected the config of a {CLASS}")
        size, patch = config.get("sample_size", 32), config.get("patch_size", 2)
        if type(size) is not int or type(patch) is not int or not 1 <= patch <= size <= 256 * patch or size % patch:
            raise ValueError(
                f"sample_size is {size!r:.50} and patch_size {patch!r:.50}; expected a side of 1 to 256 patches"
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    tensors = read_tensors(file) if file.name == WEIGHTS_FILE else read_published(file, ema=False)[0]
    try:
        found = from_diffusers(tensors)
        width, grid = found["x_embedder.proj.bias"].shape[0], (size // patch, size // patch)
        if width % 4:
            raise ValueError(f"its width is {width}; expected a multiple of 4")
    except (IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be a SiT: {error}") from error
    found["pos_embed"] = sincos_positions(width, grid)[None].to(found[TIME_WEIGHT].dtype)
    time = file.with_name(TIME_FILE)
    if time.is_file():
        found[TIME_WEIGHT] = read_tensors(time).get(TIME_WEIGHT, found[TIME_WEIGHT])
    return found
