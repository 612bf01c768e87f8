"""From samples to patches and their positions, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...functional.seam import Seam, Tap
from ...modules.norm import ModulatedNorm, Stream
from ...modules.published import modulate


class PatchEmbed(nn.Module):
    """Cuts an image into square patches and projects each."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Image (N, C, H, W) → tokens (N, T, D), row after row."""
        return self.proj(x).flatten(2).transpose(1, 2)


def sincos_positions(hidden_size: int, grid: int) -> Tensor:
    """Fixed 2-D positions (grid², D): a quarter each of sin and cos of the column, then of the row (as in MAE)."""
    frequency = 10_000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = axis.expand(grid, -1, -1)
    return torch.cat([column, column.transpose(0, 1)], dim=2).flatten(0, 1)


class FinalLayer(nn.Module):
    """Projects tokens to the pixels of their patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = ModulatedNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, stream: Stream, c: Tensor, *, student: Tap | None = None, tap: bool = False
    ) -> tuple[Tensor, Seam]:
        """Stream (N, T, D) and condition c (N, D) → (N, T, patch²·C), channels last in a patch, and its entrance."""
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


def unpatchify(patches: Tensor, grid: int) -> Tensor:
    """Lays patches out as images: (N, grid², P, P, C), row after row, → (N, C, grid·P, grid·P)."""
    return patches.unflatten(1, (grid, grid)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
