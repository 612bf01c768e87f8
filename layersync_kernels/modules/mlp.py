"""The MLPs of a block."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.gelu import gelu_mlp
from ..functional.swiglu import swiglu_mlp


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

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) → (B, N, D)."""
        if type(self.fc1) is not nn.Linear or type(self.fc2) is not nn.Linear:
            # LoRA, quantised or sharded layers in their place: there is more to them than a weight and a bias.
            return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, keep=self.keep)


class SwiGluMlp(nn.Module):
    """silu(x·A)·(x·B) through a linear layer, A and B being one layer, whose result is all that is kept."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * inner_size)
        self.w3 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) → (B, N, D)."""
        if type(self.w12) is not nn.Linear or type(self.w3) is not nn.Linear:
            a, b = self.w12(x).chunk(2, dim=-1)
            return self.w3(F.silu(a) * b)
        return swiglu_mlp(x, self.w12.weight, self.w12.bias, self.w3.weight, self.w3.bias)
