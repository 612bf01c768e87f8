"""The CUDA device code of cosine_alignment, compiled for the host and run thread by thread under sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from layersync_kernels.ops.cosine_alignment.op import REDUCTIONS
from layersync_kernels.ops.cosine_alignment.reference import cosine_alignment_reference

from .harness import BF16, FLOAT, HALF, NAMES, TYPES, assert_same_bits, rows_of, run_program


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

    def run(self, program: Path, seed: int = 0) -> Result:
        """Run forward and backward in the emulator."""
        rows = self.student.numel() // self.student.shape[-1] if self.student.shape[-1] else len(self.student)
        grad = torch.ones(()) if self.grad is None else self.grad
        options = {
            "rows": rows,
            "width": self.student.shape[-1],
            "reduction": REDUCTIONS[self.reduction],
            "eps": self.eps,
            "has_weight": int(self.weight is not None),
            "grads": grad.numel(),
            "student_grad": int(self.student_grad),
            "teacher_grad": int(self.teacher_grad),
            "max_blocks": self.max_blocks,
            "seed": seed,
        }
        none = self.reduction == "none"
        gradients = [
            (tensor.dtype, tuple(tensor.shape)) if wanted else None
            for tensor, wanted in ((self.student, self.student_grad), (self.teacher, self.teacher_grad))
        ]
        loss = tuple(self.student.shape[:-1]) if none else ()
        outputs = [(FLOAT, loss), (FLOAT, (3, rows)), (FLOAT, ()), *gradients]
        tensors = {"student": self.student, "teacher": self.teacher}
        return Result(*run_program(program, options, tensors, (self.weight, grad), outputs))

    def check(self, program: Path, seeds: tuple[int, ...] = (0,)) -> Result:
        """Compare with the reference in double precision, and the results of all seeds with each other."""
        result = self.run(program, seeds[0])
        for seed in seeds[1:]:
            assert_same_bits(result, self.run(program, seed))
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


class TestEmulator:
    """The emulator itself: a fault that it would not notice makes every other test here worthless."""

    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_correct_exchange_passes(self, program, seed):
        done = subprocess.run([program("faults"), "exchange", str(seed)], capture_output=True, text=True, check=True)
        assert int(done.stdout) == sum((i ^ 32) * i * i for i in range(64))

    def test_missing_barrier_shows_in_the_result(self, program):
        runs = {
            subprocess.run([program("faults"), "missing-barrier", str(seed)], capture_output=True, check=True).stdout
            for seed in range(4)
        }
        assert len(runs) > 1

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("out-of-bounds", "heap-buffer-overflow"),
            ("misaligned", "misaligned address"),
            ("diverged-barrier", "thread 40 has returned"),
            ("diverged-shuffle", "threads diverged"),
        ],
    )
    def test_fault_is_reported(self, program, fault, message):
        done = subprocess.run([program("faults"), fault, "1"], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert message in done.stderr


@pytest.fixture
def kernels(program):
    return program("cosine_alignment")


@pytest.mark.parametrize("teacher", TYPES, ids=NAMES.get)
@pytest.mark.parametrize("student", TYPES, ids=NAMES.get)
def test_every_pair_of_dtypes(kernels, student, teacher):
    # 296 channels: full and partial batches of loads; 13 rows: the last block is not full.
    Case(*pair(13, 296, student=student, teacher=teacher)).check(kernels)


@pytest.mark.parametrize("width", [1, 5, 64, 77, 299, 1152])
def test_widths_that_vectors_do_not_divide(kernels, width):
    Case(*pair(5, width, student=BF16, teacher=BF16)).check(kernels)


@pytest.mark.parametrize(("dtype", "width"), [(BF16, 4136), (FLOAT, 2601), (HALF, 5125)])
def test_long_rows_shared_by_a_block(kernels, dtype, width):
    Case(*pair(3, width, student=dtype, teacher=dtype)).check(kernels, seeds=(0, 1))


@pytest.mark.parametrize("dtype", TYPES, ids=NAMES.get)
def test_row_strides_and_alignments(kernels, dtype):
    student, teacher = pair(3, 5, 136, student=dtype, teacher=dtype)
    slice_of_tokens = rows_of(3, 7, 136, dtype=dtype, seed=3)[:, 1:6]
    slice_of_channels = rows_of(3, 5, 141, dtype=dtype, seed=4)[..., 3:139]  # not one row is aligned
    transposed = rows_of(5, 3, 136, dtype=dtype, seed=5).transpose(0, 1)
    expanded = rows_of(1, 5, 136, dtype=dtype, seed=6).expand(3, 5, 136)
    for other in (slice_of_tokens, slice_of_channels, transposed, expanded):
        Case(student, other).check(kernels)
        Case(other, teacher).check(kernels)
    # Aligned rows in, rows that are not out.
    padded = [rows_of(3, 5, 144, dtype=dtype, seed=seed)[..., :133] for seed in (7, 8)]
    Case(*padded).check(kernels)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_weights_and_gradients(kernels, reduction):
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 0.25, 3.0])
    grad = torch.linspace(-1, 2, 7) if reduction == "none" else torch.tensor(0.5)
    Case(*pair(7, 96), weight, reduction, grad).check(kernels, (0, 1, 2))
    Case(*pair(7, 96), None, reduction, torch.tensor(-2.0)).check(kernels)


@pytest.mark.parametrize(("student_grad", "teacher_grad"), [(True, False), (False, True)])
def test_gradient_of_one_side_alone(kernels, student_grad, teacher_grad):
    case = Case(*pair(6, 152, student=FLOAT, teacher=BF16), student_grad=student_grad, teacher_grad=teacher_grad)
    result = case.check(kernels)
    assert (result.student_grad is None) != (result.teacher_grad is None)


@pytest.mark.parametrize("width", [96, 4136])
def test_several_rows_for_each_group_of_threads(kernels, width):
    weight = torch.ones(11)
    weight[3] = 0
    Case(*pair(11, width, student=BF16, teacher=BF16), weight, max_blocks=2).check(kernels, seeds=(0, 1, 2))


@pytest.mark.parametrize("width", [96, 4136])
@pytest.mark.parametrize("weighted", [False, True])
def test_extreme_rows_stay_in_their_row(kernels, width, weighted):
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
    result = Case(student, teacher, weight, "none", torch.ones(9)).check(kernels, seeds=(0, 1))
    assert result.loss.isnan().tolist() == [row in (3, 4) for row in range(9)]
    assert result.student_grad[1].abs().sum() == 0
    assert result.teacher_grad[2].abs().sum() == 0


def test_infinite_row_beside_a_row_of_zeros_is_nan(kernels):
    student, teacher = pair(3, 96)
    student[1], teacher[1] = 0, float("inf")
    result = Case(student, teacher, None, "none", torch.ones(3)).run(kernels)
    assert result.loss.isnan().tolist() == [False, True, False]


def test_fp16_rows_whose_squares_overflow_fp16(kernels):
    student = torch.full((3, 1152), 2000.0, dtype=HALF)
    Case(student, student.clone()).check(kernels)


def test_tiny_rows_above_a_tinier_eps(kernels):
    student, teacher = pair(4, 64)
    Case(student * 1e-30, teacher * 1e25, eps=1e-37, reduction="none", grad=torch.full((4,), 1e-20)).check(kernels)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_nothing_to_align_gives_zero(kernels, shape, reduction):
    result = Case(*pair(*shape), None, reduction, torch.ones(())).check(kernels)
    assert result.loss.abs().sum() == 0
    assert result.scale == {"none": 1, "sum": 1, "mean": 1 / 3 if shape[0] else 0}[reduction]


def test_everything_masked_gives_zero_and_no_gradient(kernels):
    student, teacher = pair(5, 64)
    student[:] = float("nan")
    result = Case(student, teacher, torch.zeros(5)).run(kernels)
    assert result.loss == 0
    assert result.scale == 0
    assert result.student_grad.abs().sum() == 0
    assert result.teacher_grad.abs().sum() == 0
