"""The CUDA device code of gram_alignment, compiled for the host and run under sanitizers."""

import pytest
import torch

from layersync_kernels.ops.gram_alignment import KINDS

from .harness import FLOAT, HALF, NAMES, assert_same_bits, rows_of, run_program


def run(program, difference, diagonal, margin, kind, *, gradient=True, seed=0):
    """Derivatives of the terms (None where not wanted), and their sums over each row."""
    rows, columns = difference.shape
    options = {
        "rows": rows, "columns": columns, "diagonal": diagonal, "margin": margin, "kind": KINDS[kind],
        "gradient": gradient, "seed": seed,
    }  # fmt: skip
    outputs = [(difference.dtype, (rows, columns)) if gradient else None, (FLOAT, (rows,))]
    return run_program(program("gram_alignment"), options, {"difference": difference}, (), outputs)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=NAMES.get)
@pytest.mark.parametrize("columns", [77, 4104])  # with vectors and without, one batch of loads and more
def test_terms_derivatives_and_sums(program, dtype, columns):
    difference = rows_of(3, columns, dtype=dtype).clamp(-2, 2)
    diagonal = columns // 3
    weight = torch.full((columns,), 2.0, dtype=torch.float64)
    weight[:diagonal] = 1
    for kind, margin in zip(KINDS, (0.25, 0.0, 0.25), strict=True):
        d = difference.double().requires_grad_()
        excess = (d.abs() - margin).relu()
        terms = {"relu": excess, "square": excess**2, "abs": torch.where(excess > 0, d.abs(), 0)}[kind]
        (derivatives,) = torch.autograd.grad(terms.sum(), d)
        gradient, sums = run(program, difference, diagonal, margin, kind)
        torch.testing.assert_close(gradient.double(), derivatives, rtol=torch.finfo(dtype).eps, atol=0)
        torch.testing.assert_close(sums.double(), (terms * weight).sum(-1).detach(), rtol=1e-6, atol=0)
        assert_same_bits((gradient, sums), run(program, difference, diagonal, margin, kind, seed=1))
        assert torch.equal(run(program, difference, diagonal, margin, kind, gradient=False)[1], sums)


def test_nan_shows_in_its_row(program):
    difference = rows_of(2, 40)
    difference[1, 7] = float("nan")
    for kind in KINDS:
        gradient, sums = run(program, difference, 8, 0.1, kind)
        assert torch.equal(gradient.isnan(), difference.isnan())
        assert sums.isnan().tolist() == [False, True]
