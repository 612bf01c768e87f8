"""Models ready to draw from, of a run or a lone file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ..batch import Condition
from ..checkpoints.export import read_record
from ..checkpoints.local import run_of
from ..checkpoints.state import DataFacts, read_run_state
from ..checkpoints.weights import Weights, check_fit, fill_model, find_weights, load_weights, warn_of_first_weights
from ..config.io import load_config
from ..config.model import ModelConfig
from ..config.run import CONFIG
from ..distributed.shards import load_whole
from ..modality.base import Modality
from ..modality.images import Images
from ..modality.latents import Latents
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
        modality: what samples stand for; of a lone file with 4 channels latents, else images.
        lengths: typical ones, see `SampleSet.typical_lengths`.
        captions, text_encoder: of the data, see `SampleSet`.
    """

    model: SiT
    spec: SampleSpec
    num_classes: int
    modality: Modality
    lengths: tuple[tuple[int, ...], ...] = ()
    captions: tuple[str, ...] = ()
    text_encoder: str | None = None

    def arrays(self, samples: Tensor, condition: Condition) -> dict[str, np.ndarray]:
        """What an .npz file of samples (N, C, ...) holds: that of `Modality.arrays`, and int64 labels (N,).

        Labels are under "arr_1" beside images under "arr_0", as the evaluation suite of ADM reads them, else "labels".
        """
        arrays = self.modality.arrays(samples, condition.lengths)
        return arrays | {"arr_1" if "arr_0" in arrays else "labels": condition.labels.cpu().numpy()}


def load_trained(path: Path, *, which: str = "ema", num_heads: int | None = None) -> Trained:
    """The model of a run or checkpoint, on the CPU in evaluation mode.

    A run says what its model is, and so does an exported file; for any other lone file the sizes are read from the
    shapes of its tensors.

    Args:
        path: of a run, one of its checkpoints, or a file of weights.
        which: of its weights, see `load_weights`.
        num_heads: of a lone file whose width and depth are of no named size.

    Raises:
        CheckpointError: damaged, foreign, or of a size whose number of heads is not known; names the file.
    """
    found = find_weights(path)
    weights = load_weights(found, which=which)
    run = run_of(found) if found.is_dir() else None
    if run is not None:
        config, state = load_config(run / CONFIG), read_run_state(found)
        known = _from_facts(weights, config.model, state.data, "config.json and state.json say")
        warn_of_first_weights(config.optim, state.step, which)
    elif (record := read_record(found)) is not None:
        known = _from_facts(weights, record.model, record.data, "its metadata say")
    else:
        model = _model_from_shapes(weights, num_heads)
        known = Trained(model, model.spec, model.num_classes, Latents() if model.in_channels == 4 else Images())
        fill_model(model, weights)
    known.model.eval().requires_grad_(False)
    return known


def _from_facts(weights: Weights, config: ModelConfig, data: DataFacts, said: str) -> Trained:
    """A model by its settings and data, with the weights; `said`: where they stand, for the message."""
    _check_sizes(weights, config, data.spec, data.num_classes, said)
    try:
        with torch.device("meta"):  # takes no memory, whatever they say
            check_fit(build_model(config, data.spec, data.num_classes, data.text_width).state_dict(), weights)
        model = build_model(config, data.spec, data.num_classes, data.text_width)
        load_whole(model, weights.tensors)
    except ConfigError as error:
        raise CheckpointError(f"{weights.path} does not fit what {said}: {error}") from error
    return Trained(model, data.spec, model.num_classes, data.what, data.lengths, data.captions, data.text_encoder)


class _Sizes(NamedTuple):
    """Of a SiT, as the shapes of its tensors say."""

    hidden_size: int
    channels: int
    patch_size: tuple[int, ...]
    tokens: int | None
    """None where no positions are kept."""
    depth: int
    rows: int | None
    """Of the table of labels: a row more than classes, the null label, unless the model has none. None: no table."""
    outputs: int


def _sizes(weights: Weights) -> _Sizes:
    tensors = weights.tensors
    try:
        hidden_size, channels, *patch_size = tensors["x_embedder.proj.weight"].shape
        tokens = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else None
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        table = tensors.get("y_embedder.embedding_table.weight")
        rows = None if table is None else table.shape[0]
        outputs = tensors["final_layer.linear.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{weights.path} is no SiT checkpoint: {error!r}") from error
    if min(hidden_size, channels, *patch_size, outputs) < 1:
        raise CheckpointError(f"{weights.path} is no SiT checkpoint: a size is 0")
    there, least = sum(tensor.numel() for tensor in tensors.values()), 18 * depth * hidden_size**2
    if there < least:  # before a model of that size is built
        raise CheckpointError(
            f"{weights.path} is no SiT checkpoint: {depth} blocks of width {hidden_size} have at least {least} "
            f"weights, it has {there}"
        )
    return _Sizes(hidden_size, channels, tuple(patch_size), tokens, depth, rows, outputs)


def _check_sizes(weights: Weights, config: ModelConfig, spec: SampleSpec, num_classes: int, said: str) -> None:
    """Compares what JSON says with the weights, before a model of that size is built."""
    sizes = _sizes(weights)
    wanted: dict[str, tuple[Any, ...]] = {
        "channels": (spec.channels,),
        "rows": (num_classes, num_classes + 1, None),
        **{n: (size,) for n in ("hidden_size", "depth") if (size := getattr(config, n)) is not None},
    }
    if config.patch_size is not None:
        patch = config.patch_size
        wanted["patch_size"] = ((patch,) * len(spec.extent) if isinstance(patch, int) else patch,)
    if len(sizes.patch_size) == len(spec.extent):
        steps = zip(spec.extent, sizes.patch_size, strict=True)
        wanted["tokens"] = (math.prod(size // step for size, step in steps), None)
    else:
        wanted["patch_size"] = (tuple(spec.extent),)
    for name, accepted in wanted.items():
        if getattr(sizes, name) not in accepted:
            raise CheckpointError(
                f"{weights.path} does not fit this model: its {name.replace('_', ' ')} is {getattr(sizes, name)}, "
                f"{said} {accepted[0]}"
            )


def _model_from_shapes(weights: Weights, num_heads: int | None) -> SiT:
    hidden_size, channels, patch_size, tokens, depth, rows, outputs = _sizes(weights)
    if tokens is None or rows is None or len(patch_size) != 2 or patch_size[0] != patch_size[1]:
        raise CheckpointError(
            f"{weights.path} is no file of a published SiT: of any other model, give the folder of its run, which says "
            "what it is"
        )
    heads = num_heads or known_heads(hidden_size, depth)
    if heads is None:
        raise CheckpointError(
            f"{weights.path}: a SiT of width {hidden_size} and depth {depth} has no published number of heads; "
            "give --num-heads"
        )
    # There is a null label, unless the arguments kept in the file say otherwise.
    null_label = weights.args.get("num_classes") != rows
    try:
        return SiT(
            input_size=math.isqrt(tokens) * patch_size[0],
            patch_size=patch_size,
            in_channels=channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=heads,
            class_dropout_prob=0.1 if null_label else 0.0,
            num_classes=rows - 1 if null_label else rows,
            learn_sigma=outputs == 2 * channels * patch_size[0] ** 2,
        )
    except ValueError as error:
        raise CheckpointError(f"{weights.path}: {error}") from error
