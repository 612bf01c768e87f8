"""The MLPs of a block."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.gelu import gelu_mlp
from ..functional.swiglu import swiglu_mlp
from .linear import is_plain, linear


class GeluMlp(nn.Module):
    """Linear, tanh-GELU, linear.

    Args:
        hidden_size: channels of the tokens.
        inner_size: channels in between.
        keep: as `functional.gelu_mlp` takes it: by default the activation is not kept for the backward pass.
    """

    def __init__(
        self, hidden_size: int, inner_size: int, keep: Literal["preactivation", "activation"] = "preactivation"
    ) -> None:
        super().__init__()
        self.keep = keep
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    @property
    def last(self) -> nn.Module:
        """The layer whose result is that of the module."""
        return self.fc2

    def forward(self, x: Tensor, *, lend_bias: bool = False) -> Tensor:
        """Tokens (B, N, D) → (B, N, D); lend_bias: of the last layer, see `linear.lent_bias`."""
        if not is_plain(self.fc1) or not is_plain(self.fc2):
            return linear(self.fc2, F.gelu(self.fc1(x), approximate="tanh"), lend=lend_bias)
        bias = self.fc2.bias.detach() if lend_bias else self.fc2.bias
        return gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, bias, keep=self.keep)


class SwiGluMlp(nn.Module):
    """silu(x·A)·(x·B) through a linear layer, A and B being one. The product is not kept for the backward pass."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * inner_size)
        self.w3 = nn.Linear(inner_size, hidden_size)

    @property
    def last(self) -> nn.Module:
        """The layer whose result is that of the module."""
        return self.w3

    def forward(self, x: Tensor, *, lend_bias: bool = False) -> Tensor:
        """Tokens (B, N, D) → (B, N, D); lend_bias: of the last layer, see `linear.lent_bias`."""
        if not is_plain(self.w12) or not is_plain(self.w3):
            a, b = self.w12(x).chunk(2, dim=-1)
            return linear(self.w3, F.silu(a) * b, lend=lend_bias)
        bias = self.w3.bias.detach() if lend_bias else self.w3.bias
        return swiglu_mlp(x, self.w12.weight, self.w12.bias, self.w3.weight, bias)
