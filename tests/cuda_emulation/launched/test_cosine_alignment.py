"""cosine_alignment's launchers and kernels in the emulator: every dtype, layout, order of threads and extreme."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from layersync_kernels.ops.cosine_alignment import op
from layersync_kernels.ops.cosine_alignment.reference import cosine_alignment_reference

from .harness import BF16, FLOAT, HALF, NAMES, TYPES, rows_of, same_for_all


class Result(NamedTuple):
    loss: Tensor
    stats: Tensor
    scale: Tensor
    student_grad: Tensor | None
    teacher_grad: Tensor | None


class Case(NamedTuple):
    student: Tensor
    teacher: Tensor
    weight: Tensor | None = None
    reduction: str = "mean"
    grad: Tensor | None = None  # of the loss; None: one
    student_grad: bool = True
    teacher_grad: bool = True
    eps: float = 1e-6
    max_blocks: int = 4096

    def run(self) -> Result:
        """Forward and backward by the raw ops."""
        loss, stats, scale = op.FORWARD["cuda"](
            self.student, self.teacher, self.weight, self.eps, op.REDUCTIONS[self.reduction]
        )
        wanted = self.student_grad, self.teacher_grad
        grad = torch.ones(()) if self.grad is None else self.grad
        if grad.dim() > 0:
            grad = grad.reshape(loss.shape)
        gradients = op.BACKWARD["cuda"](grad, self.student, self.teacher, self.weight, stats, scale, *wanted)
        return Result(loss, stats, scale, *(g if w else None for g, w in zip(gradients, wanted, strict=True)))

    def check(self, seeds: tuple[int, ...] = (0,)) -> Result:
        """Compare with the reference in double precision, and the results of all seeds with each other."""
        result = same_for_all(seeds, self.run, max_row_blocks=self.max_blocks)
        student, teacher = (x.double().detach().requires_grad_() for x in (self.student, self.teacher))
        weight = None if self.weight is None else self.weight.double().reshape(student.shape[:-1])
        loss = cosine_alignment_reference(student, teacher, weight, self.eps, self.reduction, True)
        # fp32 sums of squares over at most a few thousand values, in chains of at most 64: a few units of 2^-24 each.
        terms = 1.0 if self.weight is None else self.weight.nan_to_num().abs().max().item()
        tolerance = 2e-6 * max(terms, 1.0) * (student.shape[:-1].numel() if self.reduction == "sum" else 1)
        torch.testing.assert_close(result.loss.double(), loss.detach(), rtol=0, atol=tolerance, equal_nan=True)
        if loss.numel() == 0 or student.shape[-1] == 0:
            return result
        grad = torch.ones_like(loss) if self.grad is None else self.grad.double().expand(loss.shape)
        loss.backward(grad)
        for found, exact, x in (
            (result.student_grad, student.grad, self.student),
            (result.teacher_grad, teacher.grad, self.teacher),
        ):
            if found is None:
                continue
            # One rounding to the output's dtype, and the error of the difference t̂ − c·ŝ, whose terms are at most 1 in
            # each channel and cancel when the rows are parallel.
            norm = x.double().norm(dim=-1, keepdim=True)
            factor = grad.abs().max() * max(terms, 1.0) if self.reduction != "mean" else grad.abs().max()
            bound = torch.finfo(x.dtype).eps * exact.abs() + 2e-6 * factor / torch.where(norm > 0, norm, 1)
            bound = bound + torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
            error = (found.double() - exact).abs()
            assert torch.equal(found.isnan(), exact.isnan())
            assert bool((error.nan_to_num() <= bound.nan_to_num(nan=1.0)).all()), (error - bound).max()
        return result


def pair(*shape: int, student: torch.dtype = FLOAT, teacher: torch.dtype = FLOAT) -> tuple[Tensor, Tensor]:
    return rows_of(*shape, dtype=student, seed=1), rows_of(*shape, dtype=teacher, seed=2)


@pytest.mark.parametrize("teacher", TYPES, ids=NAMES.get)
@pytest.mark.parametrize("student", TYPES, ids=NAMES.get)
def test_every_pair_of_dtypes(student, teacher):
    # 296 channels: full and partial batches of loads; 13 rows: the last block is not full.
    Case(*pair(13, 296, student=student, teacher=teacher)).check()


@pytest.mark.parametrize("width", [1, 5, 64, 77, 299, 1152])
def test_widths_that_vectors_do_not_divide(width):
    Case(*pair(5, width, student=BF16, teacher=BF16)).check()


@pytest.mark.parametrize(("dtype", "width"), [(BF16, 4136), (FLOAT, 2601), (HALF, 5125)])
def test_long_rows_shared_by_a_block(dtype, width):
    Case(*pair(3, width, student=dtype, teacher=dtype)).check(seeds=(0, 1))


@pytest.mark.parametrize("dtype", TYPES, ids=NAMES.get)
def test_row_strides_and_alignments(dtype):
    student, teacher = pair(3, 5, 136, student=dtype, teacher=dtype)
    slice_of_tokens = rows_of(3, 7, 136, dtype=dtype, seed=3)[:, 1:6]
    slice_of_channels = rows_of(3, 5, 141, dtype=dtype, seed=4)[..., 3:139]  # not one row is aligned
    transposed = rows_of(5, 3, 136, dtype=dtype, seed=5).transpose(0, 1)
    expanded = rows_of(1, 5, 136, dtype=dtype, seed=6).expand(3, 5, 136)
    for other in (slice_of_tokens, slice_of_channels, transposed, expanded):
        Case(student, other).check()
        Case(other, teacher).check()
    # Aligned rows in, rows that are not out.
    padded = [rows_of(3, 5, 144, dtype=dtype, seed=seed)[..., :133] for seed in (7, 8)]
    Case(*padded).check()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_weights_and_gradients(reduction):
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 0.25, 3.0])
    grad = torch.linspace(-1, 2, 7) if reduction == "none" else torch.tensor(0.5)
    Case(*pair(7, 96), weight, reduction, grad).check((0, 1, 2))
    Case(*pair(7, 96), None, reduction, torch.tensor(-2.0)).check()


@pytest.mark.parametrize(("student_grad", "teacher_grad"), [(True, False), (False, True)])
def test_gradient_of_one_side_alone(student_grad, teacher_grad):
    case = Case(*pair(6, 152, student=FLOAT, teacher=BF16), student_grad=student_grad, teacher_grad=teacher_grad)
    result = case.check()
    assert (result.student_grad is None) != (result.teacher_grad is None)


@pytest.mark.parametrize("width", [96, 4136])
def test_several_rows_for_each_group_of_threads(width):
    weight = torch.ones(11)
    weight[3] = 0
    Case(*pair(11, width, student=BF16, teacher=BF16), weight, max_blocks=2).check(seeds=(0, 1, 2))


@pytest.mark.parametrize("width", [96, 4136])
@pytest.mark.parametrize("weighted", [False, True])
def test_extreme_rows_stay_in_their_row(width, weighted):
    student, teacher = pair(9, width, student=BF16, teacher=FLOAT)
    student[1] = 0
    teacher[2] = 0
    student[3, 2] = float("nan")
    teacher[4, 5] = float("inf")
    student[5] *= 1e30
    teacher[5] *= 1e30
    student[6] *= 1e30
    teacher[6] *= 1e-30  # below eps
    weight = None
    if weighted:
        student[8], weight = float("nan"), torch.tensor([1.0, 2, 1, 2, 1, 2, 1, 2, 0])
    result = Case(student, teacher, weight, "none", torch.ones(9)).check(seeds=(0, 1))
    assert result.loss.isnan().tolist() == [row in (3, 4) for row in range(9)]
    assert result.student_grad[1].abs().sum() == 0
    assert result.teacher_grad[2].abs().sum() == 0


def test_infinite_row_beside_a_row_of_zeros_is_nan():
    student, teacher = pair(3, 96)
    student[1], teacher[1] = 0, float("inf")
    result = Case(student, teacher, None, "none", torch.ones(3)).run()
    assert result.loss.isnan().tolist() == [False, True, False]


def test_fp16_rows_whose_squares_overflow_fp16():
    student = torch.full((3, 1152), 2000.0, dtype=HALF)
    Case(student, student.clone()).check()


def test_tiny_rows_above_a_tinier_eps():
    student, teacher = pair(4, 64)
    Case(student * 1e-30, teacher * 1e25, eps=1e-37, reduction="none", grad=torch.full((4,), 1e-20)).check()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_nothing_to_align_gives_zero(shape, reduction):
    result = Case(*pair(*shape), None, reduction, torch.ones(())).check()
    assert result.loss.abs().sum() == 0
    assert result.scale == {"none": 1, "sum": 1, "mean": 1 / 3 if shape[0] else 0}[reduction]


def test_everything_masked_gives_zero_and_no_gradient():
    student, teacher = pair(5, 64)
    student[:] = float("nan")
    result = Case(student, teacher, torch.zeros(5)).run()
    assert result.loss == 0
    assert result.scale == 0
    assert result.student_grad.abs().sum() == 0
    assert result.teacher_grad.abs().sum() == 0
