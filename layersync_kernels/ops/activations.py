# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# ruff: noqa: ANN001, ANN201, D103
"""tanh-GELU and SiLU in Triton, as u·σ and the derivative of that, σ + the second value here."""

from __future__ import annotations

import math

import triton
import triton.language as tl

_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBIC = tl.constexpr(0.044715)
_SQUARE_LIMIT = tl.constexpr(1e3)  # beyond this square the sigmoid is 0 or 1, and the exponential 0


@triton.jit
def gelu_sigmoid(u):
    # gelu(u) = u·σ(2z), 2z = √(8/π)(u + 0.044715u³), where u/2·(1 + tanh z) cancels for negative u. The exponential is
    # that of −|2z|: it cannot overflow, and both σ and 1 − σ come without a subtraction. (Constants stand on the right:
    # the interpreter of Triton 3.8 makes a constant of constant times tensor.)
    decay = tl.exp(tl.abs(u) * -_SLOPE * (u * u * _CUBIC + 1.0))
    large = 1.0 / (1.0 + decay)
    # u·slope comes first: it is 0 where the square would make an infinity of the rest.
    curve = (tl.minimum(u * u, _SQUARE_LIMIT) * (3.0 * _CUBIC) + 1.0) * _SLOPE
    return tl.where(u >= 0, large, decay * large), u * (decay * large * large) * curve


@triton.jit
def silu_sigmoid(u):
    decay = tl.exp(tl.abs(u) * -1.0)
    large = 1.0 / (1.0 + decay)
    return tl.where(u >= 0, large, decay * large), u * (decay * large * large)
