"""What the model takes from a SiT: its parts, its floating-point operations, and the memory and traffic of a step."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from ...compiler.cards import find_card
from ...compiler.gpu_graph import compose_step, count_gpu_step
from ...compiler.roofline import predict
from ...errors import ConfigError
from ...sit.models.registry import sit_models
from ...sit.models.sit import SiT
from ..traffic import PRECISIONS, Provider, training_step
from .inputs import Unit


class Counts(NamedTuple):
    """Of a model on one GPU.

    Attributes:
        activation_bytes: alive between the passes, without copies of parameters.
        copy_bytes: of those copies.
        roofline_ms: what the passes need at the least, see `compiler.roofline`.
    """

    activation_bytes: int
    copy_bytes: int
    roofline_ms: float


def network(model: str, side: int) -> SiT:
    """A SiT without memory, for latents (4, side, side).

    Raises:
        ConfigError: unknown name, or a side that its patches do not divide.
    """
    if model not in sit_models:
        raise ConfigError(f"no model is named {model!r}; known: {', '.join(sit_models)}")
    try:
        with torch.device("meta"):
            return sit_models[model](input_size=side)
    except ValueError as error:
        raise ConfigError(f"--image-size {side}: {error}") from error


def side_of(model: str, tokens: int) -> int:
    """Side of the square latents that a model cuts into so many tokens.

    Raises:
        ConfigError: unknown model, or no square has so many.
    """
    patch, _ = network(model, math.lcm(2, 4, 8)).patch_size
    root = math.isqrt(max(tokens, 0))
    if root < 1 or root * root != tokens:
        raise ConfigError(
            f"--tokens {tokens}: expected a square number, such as 256 of latents 32 x 32 in patches of 2"
        )
    return patch * root


def units_of(model: SiT) -> tuple[Unit, ...]:
    """All that is outside of blocks, then the blocks, which take equal shares of a pass."""

    def unit(names: set[str], share: float) -> Unit:
        parameters = [p for name, p in model.named_parameters() if name in names]
        return Unit(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad), share)

    of_blocks = [{f"blocks.{n}.{name}" for name, _ in b.named_parameters()} for n, b in enumerate(model.blocks)]
    rest = {name for name, _ in model.named_parameters()} - set().union(*of_blocks)
    return (unit(rest, 0.0), *(unit(names, 1 / model.depth) for names in of_blocks))


@functools.cache
def count(model: str, side: int, batch: int, precision: str, card: str) -> Counts:
    """Count a step on fake tensors, op by op with the fused ops of this package; nothing is run.

    Args:
        model: name of `sit_models`.
        side: of the latents.
        batch: samples.
        precision: key of `traffic.PRECISIONS`.
        card: name of the one whose rates the roofline has.
    """
    make = functools.partial(training_step, Provider("fused"), model, batch, PRECISIONS[precision], input_size=side)
    two, three = (count_gpu_step(functools.partial(make, depth=blocks)) for blocks in (2, 3))
    _, step = compose_step(two, three, network(model, side).depth)
    return Counts(step.saved_bytes, step.weight_bytes, predict(step, find_card(card)).ms)
