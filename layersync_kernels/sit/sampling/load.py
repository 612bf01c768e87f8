"""Models ready to draw from, of a run or a lone file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError
from ..checkpoints.local import read_state, run_of
from ..checkpoints.weights import Weights, fill_model, find_weights, load_weights
from ..config.io import load_config
from ..config.run import CONFIG
from ..models.registry import build_model, known_heads
from ..models.sit import SiT
from ..spec import SampleSpec


@dataclass
class Trained:
    """A model ready to draw from.

    Attributes:
        model: on the CPU, in evaluation mode, without gradients.
        spec: of its samples.
        num_classes: its labels are 0..num_classes-1, and the null label where it has one.
        latent: True when its samples are latents of an autoencoder; a lone file with 4 channels is taken for one.
    """

    model: SiT
    spec: SampleSpec
    num_classes: int
    latent: bool


def load_trained(path: Path, *, ema: bool = True, num_heads: int | None = None) -> Trained:
    """The model of a run or checkpoint, on the CPU in evaluation mode.

    A run says what its model is; for a lone file the sizes are read from the shapes of its tensors.

    Args:
        path: of a run, one of its checkpoints, or a file of weights.
        ema: the averaged weights rather than the last ones.
        num_heads: of a lone file whose width and depth are of no named size.

    Raises:
        CheckpointError: damaged, foreign, or of a size whose number of heads is not known; names the file.
    """
    found = find_weights(path)
    weights = load_weights(found, ema=ema)
    run = run_of(found) if found.is_dir() else None
    if run is None:
        model = _model_from_shapes(weights, num_heads)
        spec, latent = model.spec, model.in_channels == 4
    else:
        state = read_state(found)
        try:
            spec, latent = SampleSpec.of(state["data"]["shape"]), bool(state["data"]["latent"])
            num_classes = int(state["data"]["num_classes"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{found / 'state.json'} does not describe the data: {error!r}") from error
        model = build_model(load_config(run / CONFIG).model, spec, num_classes)
    fill_model(model, weights)
    return Trained(model.eval().requires_grad_(False), spec, model.num_classes, latent)


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
    heads = num_heads or known_heads(hidden_size, depth)
    if heads is None:
        raise CheckpointError(
            f"{weights.path}: a SiT of width {hidden_size} and depth {depth} has no published number of heads; "
            "give --num-heads"
        )
    # The table has a row more than classes, the null label, unless the arguments kept in the file say otherwise.
    null_label = weights.args.get("num_classes") != rows
    try:
        return SiT(
            input_size=math.isqrt(tokens) * patch_size,
            patch_size=patch_size,
            in_channels=channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=heads,
            class_dropout_prob=0.1 if null_label else 0.0,
            num_classes=rows - 1 if null_label else rows,
            learn_sigma=outputs == 2 * channels * patch_size**2,
        )
    except ValueError as error:
        raise CheckpointError(f"{weights.path}: {error}") from error
