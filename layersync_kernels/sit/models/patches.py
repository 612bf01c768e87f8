"""From samples of one to three dimensions to patches and their positions, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...functional.seam import Seam, Tap
from ...modules.norm import ModulatedNorm, Stream
from ...modules.published import modulate

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PatchEmbed(nn.Module):
    """Cuts a sample into patches and projects each.

    Args:
        patch_size: of each dimension.
        in_channels: of the sample.
        hidden_size: D.
    """

    def __init__(self, patch_size: Sequence[int], in_channels: int, hidden_size: int) -> None:
        super().__init__()
        convolution = _CONVOLUTIONS[len(patch_size) - 1]
        size = tuple(patch_size)
        self.proj = convolution(in_channels, hidden_size, kernel_size=size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        """Samples (N, C, ...) → tokens (N, T, D), the last dimension fastest."""
        return self.proj(x).flatten(2).transpose(1, 2)


def sincos_positions(hidden_size: int, grid: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Fixed positions (T, D) of a grid of tokens in one to three dimensions, the last one fastest.

    The channels are divided among the dimensions, the last dimension first; each has sines, then cosines of its
    coordinate. With two dimensions these are the published ones (as in MAE). What does not divide by three goes to the
    last dimensions.

    Args:
        hidden_size: D, a multiple of 2, and with two dimensions of 4.
        grid: tokens along each dimension.
        device: of the result, which is fp64.
    """
    dimensions = len(grid)
    pairs, more = divmod(hidden_size // 2, dimensions)
    parts = []
    for place, (size, i) in enumerate(zip(reversed(grid), reversed(range(dimensions)), strict=True)):
        count = pairs + (place < more)
        frequency = 10_000.0 ** -(torch.arange(count, dtype=torch.float64, device=device) / count)
        angle = torch.arange(size, dtype=torch.float64, device=device)[:, None] * frequency
        axis = torch.cat([angle.sin(), angle.cos()], dim=1)
        parts.append(axis.view(*[size if j == i else 1 for j in range(dimensions)], -1).expand(*grid, -1))
    return torch.cat(parts, dim=-1).flatten(0, -2)


class FinalLayer(nn.Module):
    """Projects tokens to the values of their patches.

    Args:
        hidden_size: D.
        patch_size: of each dimension.
        out_channels: of the prediction.
    """

    def __init__(self, hidden_size: int, patch_size: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.norm_final = ModulatedNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, math.prod(patch_size) * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, stream: Stream, c: Tensor, *, student: Tap | None = None, tap: bool = False
    ) -> tuple[Tensor, Seam]:
        """Stream (N, T, D) and condition c (N, D) → (N, T, values), channels last in a patch, and its entrance."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        seam = self.norm_final.enter(stream, shift, scale, student, tap)
        return self.linear(seam.normed), seam


class PlainFinalLayer(FinalLayer):
    """The same in plain PyTorch, op by op."""

    def forward(
        self, stream: Stream, c: Tensor, *, student: Tap | None = None, tap: bool = False
    ) -> tuple[Tensor, Seam]:
        """As `FinalLayer`, for a stream without pending update and without alignment."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        x = stream.residual
        normed = modulate(F.layer_norm(x, x.shape[-1:], eps=self.norm_final.eps), shift, scale)
        return self.linear(normed), Seam(x, normed, None, None)


def unpatchify(patches: Tensor, grid: Sequence[int]) -> Tensor:
    """Lays patches (N, T, *patch, C) of a grid of tokens out as samples (N, C, ...)."""
    dimensions = len(grid)
    laid = patches.unflatten(1, tuple(grid))  # (N, *grid, *patch, C)
    order = [axis for i in range(dimensions) for axis in (1 + i, 1 + dimensions + i)]
    laid = laid.permute(0, 1 + 2 * dimensions, *order)
    for i in range(dimensions):
        laid = laid.flatten(2 + i, 3 + i)
    return laid
