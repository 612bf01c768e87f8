"""From samples to patches and back."""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cuts an image into square patches and projects each."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Image (N, C, H, W) → tokens (N, T, D), row after row."""
        return self.proj(x).flatten(2).transpose(1, 2)
