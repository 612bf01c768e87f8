"""Floating-point operations of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from .sit import SiT


def forward_flops(model: SiT, extent: Sequence[int] | None = None, words: int = 0) -> int:
    """Those of the matrix products and the attention of one sample's forward pass.

    Args:
        model: of any size.
        extent: of the sample; None: that of the model.
        words: of a text that the model attends to.
    """
    tokens, width = math.prod(model.grid_of(extent or model.extent)), model.hidden_size
    rows = {"x_embedder": tokens, "blocks": tokens, "final_layer": tokens}  # else one vector a sample
    total = 2 * tokens * model.x_embedder.get_parameter("proj.weight").numel()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        count = rows.get(name.partition(".")[0], 1)
        if "adaLN_modulation" in name:
            count = 1
        elif "kv_linear" in name or (name.startswith("text_embedder") and model.condition == "cross"):
            count = words
        total += 2 * count * module.weight.numel()
    pairs = tokens * (tokens + (words if model.condition == "cross" else 0))
    return total + model.depth * 4 * pairs * width


def training_flops(model: SiT) -> int:
    """Of a sample in a training step: three times those of the forward pass."""
    return 3 * forward_flops(model)
