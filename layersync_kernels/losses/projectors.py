"""From the model's channels to those of a teacher."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import Tensor, nn

from ..functional.cosine import layersync_loss
from ..functional.projected import projected_alignment_loss


class Mlp(nn.Sequential):
    """Linear layers with SiLU in between. Given a teacher, the loss of what they make of the student's tokens.

    The last layer and the loss are one op. It runs inside this module, where DDP and FSDP have its parameters at hand.
    """

    def forward(self, input: Tensor, teacher: Tensor | None = None, **options: Any) -> Tensor:
        """Tokens (..., D) → (..., T); given a teacher (..., T), the loss, with the options of `layersync_loss`."""
        return super().forward(input) if teacher is None else projected_loss(self, input, teacher, **options)


def projected_loss(layers: nn.Sequential, input: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """The loss of what layers make of tokens (..., D), against a teacher's (..., T): the last one and it are one op."""
    *body, last = layers
    for layer in body:
        input = layer(input)
    if type(last) is not nn.Linear:  # sharded by itself, quantised, with LoRA: its own forward knows how
        return layersync_loss(last(input), teacher, **options)
    return projected_alignment_loss(input, last.weight, last.bias, teacher, **options)


def is_mlp(projector: nn.Module) -> bool:
    """Whether it is linear layers with SiLU in between and nothing else, as REPA's `model.projectors` are.

    One that is sharded by itself, or has hooks, is not: its layers must not be called past it.
    """
    if type(projector) is not nn.Sequential or projector._forward_hooks or projector._forward_pre_hooks:
        return False
    return len(projector) % 2 == 1 and all(
        type(layer) is nn.SiLU if number % 2 else isinstance(layer, nn.Linear) for number, layer in enumerate(projector)
    )


def mlp(*widths: int) -> Mlp:
    """Linear layers of these widths, initialised as the published models do."""
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(widths):
        linear = nn.Linear(width_in, width_out)
        nn.init.xavier_uniform_(linear.weight)  # as the published models initialise every linear layer of theirs
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.SiLU()]
    return Mlp(*layers[:-1])


class TokenConv(nn.Conv2d):
    """A 3×3 convolution over tokens (B, N, D) on their grid; tokens are a channels-last image, so nothing is copied."""

    def __init__(self, width_in: int, width_out: int, grid: tuple[int, int] | None) -> None:
        super().__init__(width_in, width_out, kernel_size=3, padding=1)
        self.grid = grid

    def forward(self, hidden: Tensor) -> Tensor:
        """Tokens (B, N, D) → (B, N, T)."""
        image = hidden.unflatten(1, grid_of(hidden.shape[1], self.grid)).permute(0, 3, 1, 2)
        return super().forward(image).permute(0, 2, 3, 1).flatten(1, 2)


def grid_of(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """(rows, columns) of a number of tokens: `grid` if they fill it, a square without one; else ValueError."""
    rows, columns = grid or (math.isqrt(tokens),) * 2
    if rows * columns != tokens:
        raise ValueError(
            f"RepresentationAlignmentLoss: {tokens} tokens do not fill "
            + ("a square grid; give grid=(rows, columns)" if grid is None else f"the grid of {rows}x{columns}")
        )
    return rows, columns
