"""Rotary positions as LightningDiT's blocks are given them: a module that turns queries and keys by its tables."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..modules.block import AdaLNZeroBlock

ARGUMENT = "feat_rope"
_TABLES = ("freqs_cos", "freqs_sin")


class RotaryBlock(AdaLNZeroBlock):
    """The fused block, called as LightningDiT's: its third argument is the module that holds the tables.

    Attributes:
        proven: classes of such modules that were seen to turn as the fused op does.
    """

    proven: tuple[type[nn.Module], ...] = ()

    def forward(self, x: Tensor, c: Tensor, feat_rope: nn.Module | None = None) -> Any:  # type: ignore[override]
        """Tokens x (B, N, D), condition c (B, D), and what holds cosines and sines (N, D / heads) → (B, N, D).

        Raises:
            TypeError: rotary positions of a class that the block was not proven with.
        """
        if feat_rope is None:
            return super().forward(x, c)
        if type(feat_rope) not in self.proven:
            raise TypeError(
                f"apply_layersync_kernels: a fused block got a {type(feat_rope).__name__} as {ARGUMENT}, which the "
                f"model did not hold when its blocks were replaced; expected "
                f"{' or '.join(cls.__name__ for cls in self.proven) or 'None'}"
            )
        return super().forward(x, c, tables(feat_rope))


def tables(rope: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, E) of a module of rotary positions."""
    return rope.freqs_cos, rope.freqs_sin


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that hold tables of rotary positions, two of one shape (N, E), and nothing else."""
    return [module for module in model.modules() if _is_rotary(module)]


def _is_rotary(module: nn.Module) -> bool:
    buffers = dict(module.named_buffers())
    if buffers.keys() != set(_TABLES) or any(True for _ in module.parameters()):
        return False
    cos, sin = buffers.values()
    return cos.dim() == 2 and cos.shape == sin.shape


def with_tables(rope: nn.Module, cos: Tensor, sin: Tensor) -> nn.Module:
    """A copy with other tables and without hooks."""
    replaced: dict[int, object] = {id(old): new for old, new in zip(tables(rope), (cos, sin), strict=True)}
    replaced |= {id(value): type(value)() for key, value in vars(rope).items() if key.endswith("_hooks")}
    return copy.deepcopy(rope, replaced)
