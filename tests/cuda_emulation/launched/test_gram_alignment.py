"""gram_alignment's launcher and kernel in the emulator."""

import pytest
import torch

from layersync_kernels.ops.gram_alignment import KINDS, op

from .harness import FLOAT, HALF, NAMES, rows_of, same_for_all


def run(difference, diagonal, margin, kind, *, gradient=True):
    """Derivatives of the terms (None where not wanted), written over a copy, and the sums of terms over each row."""
    written = difference.clone().unsqueeze(0)
    sums = op.STRIP["cuda"](written, diagonal, margin, KINDS[kind], written if gradient else None)
    assert gradient or torch.equal(written[0], difference)
    return written[0] if gradient else None, sums[0]


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=NAMES.get)
@pytest.mark.parametrize("columns", [77, 4104])  # with vectors and without, one batch of loads and more
def test_terms_derivatives_and_sums(dtype, columns):
    difference = rows_of(3, columns, dtype=dtype).clamp(-2, 2)
    diagonal = columns // 3
    weight = torch.full((columns,), 2.0, dtype=torch.float64)
    weight[:diagonal] = 1
    for kind, margin in zip(KINDS, (0.25, 0.0, 0.25), strict=True):
        d = difference.double().requires_grad_()
        excess = (d.abs() - margin).relu()
        terms = {"relu": excess, "square": excess**2, "abs": torch.where(excess > 0, d.abs(), 0)}[kind]
        (derivatives,) = torch.autograd.grad(terms.sum(), d)
        gradient, sums = same_for_all((0, 1), lambda m=margin, k=kind: run(difference, diagonal, m, k))
        torch.testing.assert_close(gradient.double(), derivatives, rtol=torch.finfo(dtype).eps, atol=0)
        torch.testing.assert_close(sums.double(), (terms * weight).sum(-1).detach(), rtol=1e-6, atol=0)
        assert torch.equal(run(difference, diagonal, margin, kind, gradient=False)[1], sums)


def test_nan_shows_in_its_row():
    difference = rows_of(2, 40)
    difference[1, 7] = float("nan")
    for kind in KINDS:
        gradient, sums = run(difference, 8, 0.1, kind)
        assert torch.equal(gradient.isnan(), difference.isnan())
        assert sums.isnan().tolist() == [False, True]
