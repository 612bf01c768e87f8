"""spatial_norm's launcher and kernel in the emulator."""

from __future__ import annotations

import pytest
import torch

from layersync_kernels.ops.spatial_norm import op, spatial_norm_reference

from ...support.backends import assert_as_exact_as
from .harness import NAMES, TYPES, rows_of, same_for_all


def check(x: torch.Tensor, alpha: float = 1.0, eps: float = 1e-6) -> torch.Tensor:
    """Compare with the reference in double precision, and two orders of threads with each other."""
    (result,) = same_for_all((0, 1), lambda: (op.SPATIAL_NORM["cuda"](x, alpha, eps),))
    finite = torch.nan_to_num
    truth = spatial_norm_reference(x.double(), alpha, eps)
    assert torch.equal(result.isnan(), truth.isnan())
    assert_as_exact_as(finite(result), finite(spatial_norm_reference(x, alpha, eps)), finite(truth))
    return result


@pytest.mark.parametrize("dtype", TYPES, ids=NAMES.get)
@pytest.mark.parametrize("width", [72, 13])  # vectors, two tiles, the last not full; single values
def test_every_dtype_and_layout(dtype, width):
    check(rows_of(2, 39, width, dtype=dtype)[:, 1:])  # behind a class token; slices of one token and of two
    check(rows_of(5, 2, width, dtype=dtype).transpose(0, 1), alpha=0.5)
    check(rows_of(2, 5, width + 1, dtype=dtype)[..., 1:])  # not one row is aligned


def test_more_tokens_than_a_batch_of_loads():
    check(rows_of(1, 171, 8) + 1e3)


def test_extremes():
    x = rows_of(2, 40, 12)
    x[0, :, 1], x[0, :, 2], x[0, :, 3] = 0.1, x[0, :, 2] * 1e30, x[0, :, 3] * 1e18
    x[1, 5, 4], x[1, 6, 7] = float("nan"), float("inf")
    result = check(x)
    assert result[0, :, 1].abs().max() == 0
    assert result.isnan().sum() == 2 * 40
