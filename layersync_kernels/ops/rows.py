"""How a kernel sees a (..., D) tensor: M rows of D contiguous values at any stride (twin: csrc/common/host/rows.h)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Row r starts at element `(r // inner) * outer_stride + (r % inner) * inner_stride` of `tensor`."""

    tensor: Tensor
    count: int
    width: int
    inner: int
    outer_stride: int
    inner_stride: int


def as_rows(tensor: Tensor) -> Rows:
    """Collapse the leading dimensions of a (..., D) tensor into at most two strides, or make one contiguous copy.

    Nothing of a tensor without elements is read: `contiguous()` hands it back with its strides, and it is taken so.
    """
    *leading, width = tensor.shape
    collapsed: list[tuple[int, int]] = []  # (extent, stride), innermost first
    for extent, stride in zip(reversed(leading), reversed(tensor.stride()[:-1]), strict=True):
        if extent == 1:
            continue
        if collapsed and stride == collapsed[-1][0] * collapsed[-1][1]:
            collapsed[-1] = (collapsed[-1][0] * extent, collapsed[-1][1])
        else:
            collapsed.append((extent, stride))
    if (len(collapsed) > 2 or (width > 1 and tensor.stride(-1) != 1)) and tensor.numel() > 0:
        return as_rows(tensor.contiguous())
    (inner, inner_stride), (_, outer_stride) = [*collapsed, (1, 0), (1, 0)][:2]
    return Rows(tensor, math.prod(leading), width, max(inner, 1), outer_stride, inner_stride)
