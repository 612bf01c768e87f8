"""Models by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ...errors import ConfigError
from ..config.model import ModelConfig
from ..spec import SampleSpec
from .sit import SiT

# Width, depth, heads. XL to S are the published sizes; ours are XXL, of a billion parameters, and Ti (the shape of
# ViT-Ti), N and P, for small images and CPUs.
_SIZES = {
    "XL": (1152, 28, 16),
    "L": (1024, 24, 16),
    "B": (768, 12, 12),
    "S": (384, 12, 6),
    "XXL": (1344, 32, 21),
    "Ti": (192, 12, 3),
    "N": (192, 6, 3),
    "P": (128, 6, 2),
}

sit_models: dict[str, Callable[..., SiT]] = {
    f"SiT-{size}/{patch}": partial(SiT, hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
    for size, (width, depth, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
"""Constructors by name, "SiT-XL/2" being size XL with patches of 2; any keyword of `SiT` can be given or overridden."""


def known_heads(hidden_size: int, depth: int) -> int | None:
    """The heads of the named size with that width and depth, or None where there is none."""
    return next((heads for width, blocks, heads in _SIZES.values() if (width, blocks) == (hidden_size, depth)), None)


def build_model(config: ModelConfig, spec: SampleSpec, num_classes: int, text_width: int | None = None) -> SiT:
    """The SiT that `config` names, for samples of that shape.

    Args:
        config: of the model.
        spec: of the samples.
        num_classes: of the labels.
        text_width: channels of the words of their texts; None: there are none.

    Raises:
        ConfigError: unknown name (the message lists the known ones), or sizes that do not go together.
    """
    if config.model not in sit_models:
        raise ConfigError(f"no model is named {config.model!r}; known: {', '.join(sit_models)}")
    overrides = {
        name: value
        for name in ("patch_size", "hidden_size", "depth", "num_heads")
        if (value := getattr(config, name)) is not None
    }
    condition = config.condition
    if condition == "auto":
        condition = "class" if text_width is None else "cross"
    if condition in ("embedding", "cross") and text_width is None:
        raise ConfigError(f"--condition {condition}: the data has no texts; give --text-encoder, or --condition class")
    try:
        return sit_models[config.model](
            input_size=spec.extent,
            in_channels=spec.channels,
            num_classes=num_classes,
            class_dropout_prob=config.class_dropout,
            kernels=config.kernels,
            recompute=config.recompute,
            positions=config.positions,
            condition=condition,
            text_width=text_width,
            **overrides,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
