"""Collapsing leading dimensions: every row must be found where PyTorch finds it."""

import pytest
import torch

from layersync_kernels.ops.rows import as_rows

VIEWS = {
    "contiguous": (lambda: torch.randn(2, 3, 4, 5), True),
    "one row": (lambda: torch.randn(5), True),
    "tokens sliced": (lambda: torch.randn(2, 6, 5)[:, 1:4], True),
    "batch second": (lambda: torch.randn(6, 2, 5).transpose(0, 1), True),
    "channels sliced": (lambda: torch.randn(2, 6, 9)[..., :5], True),
    "expanded": (lambda: torch.randn(1, 6, 5).expand(3, 6, 5), True),
    "size-one dimensions of odd stride": (lambda: torch.randn(4, 1, 6, 1, 5)[::2], True),
    "channels strided": (lambda: torch.randn(2, 6, 10)[..., ::2], False),
    "three strides": (lambda: torch.randn(2, 5, 3, 7, 4, 5)[:, 1, :, 2], False),
    "empty": (lambda: torch.randn(0, 3, 5), True),
    "empty with channels strided": (lambda: torch.randn(4, 10)[:, ::2][:0], True),
    "no channels at three strides": (lambda: torch.randn(2, 5, 3, 7, 4, 5)[:, 1, :, 2, ..., :0], True),
}


@pytest.mark.parametrize("name", VIEWS)
def test_rows_are_where_pytorch_has_them(name):
    make, without_copy = VIEWS[name]
    tensor = make()
    rows = as_rows(tensor)
    assert (rows.tensor.data_ptr() == tensor.data_ptr()) == without_copy
    expected = torch.atleast_2d(tensor).flatten(0, -2)
    assert (rows.count, rows.width) == expected.shape
    for row in range(rows.count):
        start = row // rows.inner * rows.outer_stride + row % rows.inner * rows.inner_stride
        actual = rows.tensor.as_strided((rows.width,), (1,), rows.tensor.storage_offset() + start)
        assert torch.equal(actual, expected[row])
