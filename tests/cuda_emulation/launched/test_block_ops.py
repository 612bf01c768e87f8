"""The launchers and kernels of gated_residual_norm and gelu in the emulator."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layersync_kernels.ops.gated_residual_norm import op
from layersync_kernels.ops.gated_residual_norm.reference import gated_residual_norm_reference
from layersync_kernels.ops.gelu import op as gelu

from .harness import BF16, FLOAT, HALF, NAMES, TYPES, rows_of, same_for_all

# (residual stream, half-block)
STREAMS = [(FLOAT, FLOAT), (BF16, BF16), (HALF, HALF), (FLOAT, BF16), (FLOAT, HALF)]
STREAM_IDS = [f"{NAMES[r]}-{NAMES[h]}" for r, h in STREAMS]
ALL_PARTS = ("branch", "gate", "shift", "scale")


class Forward(NamedTuple):
    residual: Tensor | None
    normed: Tensor | None
    stats: Tensor | None
    alignment: Tensor | None


class Backward(NamedTuple):
    d_x: Tensor | None
    d_branch: Tensor | None
    d_gate: Tensor | None
    d_shift: Tensor | None
    d_scale: Tensor | None
    d_bias: Tensor | None


def wanted_alone(results: Iterable[Tensor], wanted: Iterable[bool]) -> list[Tensor | None]:
    """None for what was not asked for, which has no elements."""
    for result, asked in zip(results, wanted, strict=True):
        assert asked or result.numel() == 0
    return [result if asked else None for result, asked in zip(results, wanted, strict=True)]


def per_row(modulation: Tensor | None, rows: int) -> Tensor | None:
    """(G, D) → (M, D)."""
    return None if modulation is None else modulation.double().repeat_interleave(rows // len(modulation), 0)


def assert_close(found: Tensor, exact: Tensor, slack: float | Tensor = 0.0) -> None:
    """One rounding to the output's dtype and `slack` units of fp32 at the magnitude of the terms.

    The slack covers sums of a few thousand values in chains of at most 64.
    """
    assert torch.equal(found.isnan(), exact.isnan())
    bound = torch.finfo(found.dtype).eps * exact.abs() + slack * torch.finfo(FLOAT).eps
    bound = bound + torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    error = (found.double() - exact).abs()
    same = (error <= bound) | (found.double() == exact) | exact.isnan()
    assert bool(same.all()), f"{(error - bound)[~same].max():.3g} too far, of {exact[~same].abs().max():.3g}"


@dataclass
class Seam:
    """One call of gated_residual_norm; tensors that are None are missing."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    student: Tensor | None = None
    norm: bool = True
    rms: bool = False
    eps: float = 1e-6
    align_eps: float = 1e-6
    dtype: torch.dtype = FLOAT
    max_blocks: int = 4096

    @property
    def rows(self) -> int:
        return self.x.shape[:-1].numel()

    @property
    def groups(self) -> int:
        return next((len(m) for m in (self.gate, self.shift, self.scale) if m is not None), 1)

    def forward(self) -> Forward:
        """The raw op; None for what is not wanted."""
        parts = (getattr(self, name) for name in (*ALL_PARTS, "student"))
        results = op.FORWARD["cuda"](self.x, *parts, self.norm, self.rms, self.eps, self.align_eps, self.dtype)
        wanted = self.branch is not None, self.norm, self.norm, self.student is not None
        return Forward(*wanted_alone(results, wanted))

    def check_forward(self, seeds: tuple[int, ...] = (0,)) -> Forward:
        """Compare with the reference in double precision, and the results of all seeds with each other."""
        result = same_for_all(seeds, self.forward, max_row_blocks=self.max_blocks)
        x = self.x.double().reshape(self.rows, -1)
        rows = {name: getattr(self, name) for name in ("branch", "student")}
        rows = {name: None if t is None else t.double().reshape(x.shape) for name, t in rows.items()}
        gate, shift, scale = (per_row(m, self.rows) for m in (self.gate, self.shift, self.scale))
        common = {"rms": self.rms, "eps": self.eps, "align_eps": self.align_eps, "dtype": torch.float64}
        r = x
        if self.branch is not None:
            exact, _, _ = gated_residual_norm_reference(x, rows["branch"], gate, *[None] * 3, norm=False, **common)
            r = result.residual.double().reshape(x.shape)
            slack = x.abs() + (1 if gate is None else gate.abs()) * rows["branch"].abs()
            assert_close(result.residual.reshape(x.shape), exact, slack.nan_to_num(posinf=0))
        # From here on with the residual as it was rounded.
        _, y, cosine = gated_residual_norm_reference(
            r, None, None, shift, scale, rows["student"], norm=self.norm, **common
        )
        if self.norm:
            mean, rstd = result.stats.double()
            variance = (r - (0 if self.rms else r.mean(-1, keepdim=True))).square().mean(-1)
            largest = r.abs().amax(-1)
            slack = (8 * largest * rstd).unsqueeze(-1) * (1 if scale is None else (1 + scale).abs())
            slack = slack + 8 * y.abs() + (0 if shift is None else 8 * shift.abs())
            assert_close(result.normed.reshape(x.shape), y, slack.nan_to_num(posinf=0))
            assert_close(mean, 0 * largest if self.rms else r.mean(-1), 8 * largest.nan_to_num(posinf=0))
            assert_close(rstd, (variance + self.eps).rsqrt(), 16 * rstd.nan_to_num())
        if self.student is not None:
            # The reference flips the sign of zero.
            assert_close(result.alignment[0].double(), cosine + 0.0, 32)
        return result

    def backward(self, d_residual, d_normed, residual, stats, other, factors, sums) -> Backward:
        """The raw op; None for what is not wanted."""
        norm, moved = d_normed is not None, d_normed is not None or other is not None
        bias = sums and self.branch is not None
        results = op.BACKWARD["cuda"](
            d_residual, d_normed, residual, self.branch, self.gate, self.scale, stats if norm else None, other, factors,
            self.rms, self.groups if sums else 0, bias,
        )  # fmt: skip
        wanted = moved, self.branch is not None, sums and self.gate is not None, sums and norm, sums and norm, bias
        return Backward(*wanted_alone(results, wanted))

    def check_backward(
        self,
        *,
        d_residual: Tensor | None = None,
        d_normed: Tensor | None = None,
        other: Tensor | None = None,
        factors: Tensor | None = None,
        sums: bool = True,
        seeds: tuple[int, ...] = (0,),
    ) -> Backward:
        """Compare with autograd through the reference in double precision, from a rounded residual on."""
        rows, width = self.rows, self.x.shape[-1]
        residual = self.x  # the backward pass takes the residual as given
        flat = residual.double().reshape(rows, width)
        mean = 0 * flat[:, 0] if self.rms else flat.mean(-1)
        rstd = ((flat - mean.unsqueeze(-1)).square().mean(-1) + self.eps).rsqrt()
        stats = torch.stack([mean, rstd]).float()
        arguments = (d_residual, d_normed, residual, stats, other, factors, sums)
        result = same_for_all(seeds, lambda: self.backward(*arguments), max_row_blocks=self.max_blocks)

        def flatten(tensor: Tensor | None) -> Tensor:
            return torch.zeros_like(flat) if tensor is None else tensor.double().reshape(rows, width)

        r = flat.clone().requires_grad_()
        shift, scale = (
            (torch.zeros if m is None else lambda *_, m=m, **__: m.double())(self.groups, width, dtype=torch.float64)
            for m in (self.shift, self.scale)
        )
        shift, scale = shift.requires_grad_(), scale.requires_grad_()
        # The magnitude of what is added up on the way.
        terms = flatten(d_residual).abs()
        dr = flatten(d_residual)
        if d_normed is not None:
            _, y, _ = gated_residual_norm_reference(
                r, None, None, per_row(shift, rows), per_row(scale, rows), None,
                norm=True, rms=self.rms, eps=self.eps, align_eps=self.align_eps, dtype=torch.float64,
            )  # fmt: skip
            y.backward(flatten(d_normed))
            dr = dr + r.grad
            a = flatten(d_normed) * (1 + per_row(scale.detach(), rows))
            normed = (flat - mean.unsqueeze(-1)).abs() * rstd.unsqueeze(-1)
            rounding = 1 + flat.abs().amax(-1, keepdim=True) * rstd.unsqueeze(-1)  # of r − mean
            terms = terms + 8 * rounding * rstd.unsqueeze(-1) * (
                a.abs() + a.abs().mean(-1, keepdim=True) + normed * (a.abs() * normed).mean(-1, keepdim=True)
            )
        if other is not None:
            p, q = factors.double().unsqueeze(-1)
            live = (p != 0) | (q != 0)
            dr = dr + torch.where(live, p * flatten(other) + q * flat, 0)
            terms = terms + torch.where(live, (p * flatten(other)).abs() + (q * flat).abs(), 0)
        terms = 8 * terms.nan_to_num(posinf=0)
        if d_normed is not None or other is not None:
            assert_close(result.d_x.reshape(rows, width), dr, terms)
        gate = per_row(self.gate, rows)
        if self.branch is not None:
            factor = torch.ones(()) if gate is None else gate
            assert_close(result.d_branch.reshape(rows, width), factor * dr, factor.abs() * terms)
        if not sums:
            return result

        def grouped(values: Tensor) -> Tensor:
            return values.reshape(self.groups, -1, width).sum(1)

        if self.branch is not None:
            slack = grouped(factor.abs() * (8 * dr.abs() + terms)).nan_to_num()
            assert_close(result.d_bias, grouped(factor * dr), slack)
        if self.gate is not None:
            branch = flatten(self.branch)
            slack = grouped((branch.abs() * (8 * dr.abs() + terms)).nan_to_num())
            assert_close(result.d_gate, grouped(branch * dr), slack)
        if d_normed is not None:
            dy = flatten(d_normed)
            assert_close(result.d_shift, shift.grad, grouped(8 * dy.abs()).nan_to_num())
            assert_close(result.d_scale, scale.grad, grouped(16 * rounding * dy.abs() * (1 + normed)).nan_to_num())
        return result


def seam(
    *shape: int,
    stream: tuple[torch.dtype, torch.dtype] = (FLOAT, FLOAT),
    modulation: torch.dtype | None = None,
    parts: tuple[str, ...] = ALL_PARTS,
    groups: int = 1,
    student: bool = False,
    **kwargs,
) -> Seam:
    """Random inputs with the parts asked for."""
    r, h = stream
    tensors = {"branch": rows_of(*shape, dtype=h, seed=2)} if "branch" in parts else {}
    for seed, name in enumerate(("gate", "shift", "scale"), 3):
        if name in parts:
            tensors[name] = rows_of(groups, shape[-1], dtype=modulation or h, seed=seed)
    x = rows_of(*shape, seed=1) * 2 + 0.5
    if student:
        tensors["student"] = (x + rows_of(*shape, seed=6)).to(r)
    return Seam(x.to(r), dtype=h, **tensors, **kwargs)


def gradients(case: Seam, *names: str) -> dict[str, Tensor]:
    """Random gradients of the outputs, and of the alignment."""
    shape, rows = case.x.shape, case.rows
    given = {
        "d_residual": rows_of(*shape, dtype=case.x.dtype, seed=11),
        "d_normed": rows_of(*shape, dtype=case.dtype, seed=12),
        "other": rows_of(*shape, dtype=case.x.dtype, seed=13),
        "factors": rows_of(2, rows, seed=14) * 0.1,
    }
    return {name: given[name] for name in names}


EVERYTHING = ("d_residual", "d_normed", "other", "factors")


@pytest.mark.parametrize("stream", STREAMS, ids=STREAM_IDS)
class TestEveryDtype:
    def test_modulation_in_fp32_or_in_the_dtype_of_the_branch(self, stream):
        # 296 channels: full and partial steps of a warp; 14 rows in 2 groups: the last block is not full.
        for modulation in {FLOAT, stream[1]}:
            case = seam(14, 296, stream=stream, modulation=modulation, groups=2, student=True)
            case.check_forward()
            case.check_backward(**gradients(case, *EVERYTHING))

    @pytest.mark.parametrize("width", [2048, 2056, 5128])
    def test_long_rows(self, stream, width):
        case = seam(2, width, stream=stream, student=True)
        case.check_forward()
        case.check_backward(**gradients(case, *EVERYTHING))

    def test_rows_that_no_vector_divides(self, stream):
        case = seam(3, 131, stream=stream, student=True)
        case.check_forward()
        case.check_backward(**gradients(case, *EVERYTHING))


@pytest.mark.parametrize("width", [1, 5, 77, 2061, 4100])
def test_odd_widths(width):
    case = seam(3, width, stream=(FLOAT, BF16), student=True, eps=1e-3)
    case.check_forward(seeds=(0, 1))
    case.check_backward(**gradients(case, *EVERYTHING), seeds=(0, 1))


@pytest.mark.parametrize(
    "parts", [(), ("branch",), ("branch", "gate"), ("scale",), ("shift",), ("branch", "shift", "scale"), ALL_PARTS]
)
@pytest.mark.parametrize("width", [64, 77])  # rows in registers, rows read again
def test_missing_parts(parts, width):
    case = seam(6, width, stream=(FLOAT, BF16), parts=parts, groups=3)
    case.check_forward()
    case.check_backward(**gradients(case, "d_residual", "d_normed"))


@pytest.mark.parametrize("width", [64, 77])
def test_end_of_a_block_without_a_norm(width):
    case = seam(6, width, stream=(FLOAT, BF16), parts=("branch", "gate"), groups=3, norm=False, student=True)
    case.check_forward()
    result = case.check_backward(**gradients(case, "d_residual"))
    assert result.d_x is None
    assert result.d_shift is None
    case.check_backward(**gradients(case, "other", "factors"))


def test_alignment_of_rows_that_other_threads_wrote():
    # 5128 channels: the residual is written by steps of 8 channels a thread, and read again by steps of 4.
    case = seam(2, 5128, stream=(FLOAT, BF16), parts=("branch", "gate"), norm=False, student=True)
    case.check_forward(seeds=(0, 1))


@pytest.mark.parametrize("given", [("d_normed",), ("d_normed", "other", "factors"), ("d_residual", "other", "factors")])
def test_missing_gradients(given):
    case = seam(6, 64, stream=(FLOAT, HALF), groups=2)
    case.check_backward(**gradients(case, *given))
    case.check_backward(**gradients(case, *given), sums=False)


@pytest.mark.parametrize("width", [64, 77, 5128])
def test_rms_norm(width):
    case = seam(4, width, stream=(BF16, BF16), groups=2, rms=True)
    result = case.check_forward()
    assert result.stats[0].abs().max() == 0
    case.check_backward(**gradients(case, "d_residual", "d_normed"))


@pytest.mark.parametrize("groups", [1, 2, 7, 14])
@pytest.mark.parametrize("rows", [14, 126])  # one run of rows in each group; up to sixteen, and runs of unequal size
def test_groups_of_rows_and_runs_in_a_group(groups, rows):
    case = seam(rows, 40, stream=(FLOAT, BF16), groups=groups)
    case.check_forward()
    case.check_backward(**gradients(case, "d_residual", "d_normed"), seeds=(0, 1))


def test_many_runs_of_a_group_are_added_in_order():
    case = seam(560, 40, stream=(FLOAT, FLOAT), groups=2)  # 35 runs of 8 rows: slices of 4 and 5
    case.check_backward(**gradients(case, "d_residual", "d_normed"), seeds=(0, 1, 2))


def test_several_rows_for_each_group_of_threads():
    for width in (96, 2056, 77):
        case = seam(22, width, stream=(BF16, BF16), groups=11, student=True, max_blocks=2)
        case.check_forward(seeds=(0, 1))


@pytest.mark.parametrize("stream", [(BF16, BF16), (FLOAT, BF16)], ids=["bf16", "mixed"])
def test_row_strides_and_alignments(stream):
    r, h = stream
    case = seam(3, 4, 136, stream=stream, groups=3, student=True)

    def views(dtype: torch.dtype) -> list[Tensor]:
        return [
            rows_of(3, 7, 136, dtype=dtype, seed=21)[:, 1:5],
            rows_of(3, 4, 141, dtype=dtype, seed=22)[..., 3:139],  # not one row is aligned
            rows_of(4, 3, 136, dtype=dtype, seed=23).transpose(0, 1),
            rows_of(1, 4, 136, dtype=dtype, seed=24).expand(3, 4, 136),
        ]

    for of_r, of_h in zip(views(r), views(h), strict=True):
        strided = replace(case, x=of_r, branch=of_h, student=of_r.flip(0))
        strided.check_forward()
        # The gradients of a slice of a cat.
        strided.check_backward(d_residual=of_r, d_normed=of_h, other=of_r, factors=rows_of(2, 12))
    # One tensor alone that is not aligned.
    unaligned = {"x": views(r)[1], "branch": views(h)[1], "student": views(r)[1]}
    for name, tensor in unaligned.items():
        replace(case, **{name: tensor}).check_forward()
    given = gradients(case, *EVERYTHING)
    for name in ("d_residual", "d_normed", "other"):
        case.check_backward(**given | {name: views(given[name].dtype)[1]})
    # adaLN's six parts are slices of one tensor.
    modulation = rows_of(3, 3 * 136 + 3, dtype=h, seed=25)
    for offset in (0, 1):
        gate, shift, scale = (modulation[:, offset + i * 136 : offset + (i + 1) * 136] for i in range(3))
        sliced = replace(case, gate=gate, shift=shift, scale=scale)
        sliced.check_forward()
        sliced.check_backward(**gradients(case, "d_residual", "d_normed"))
    per_token = replace(case, gate=case.gate[:1].expand(12, 136), shift=None, scale=case.scale.repeat(4, 1))
    per_token.check_forward()
    per_token.check_backward(**gradients(case, "d_residual", "d_normed"))


@pytest.mark.parametrize("width", [96, 77, 5128])
def test_nan_and_infinity_stay_in_their_row(width):
    case = seam(8, width, groups=4, student=True)
    case.x[2, 3], case.x[5, 1] = float("nan"), float("inf")
    result = case.forward()
    for output in (result.normed, result.stats.T, result.alignment.T):
        assert output.isnan().any(-1).tolist() == [row in (2, 5) for row in range(8)]
    given = gradients(case, "d_residual", "d_normed")
    backward = case.backward(given["d_residual"], given["d_normed"], case.x, result.stats, None, None, True)
    for output in (backward.d_x, backward.d_branch):
        assert (~output.isfinite()).any(-1).tolist() == [row in (2, 5) for row in range(8)]
    for sums in (backward.d_gate, backward.d_scale):
        assert (~sums.isfinite()).any(-1).tolist() == [False, True, True, False]
    assert backward.d_shift.isfinite().all()


@pytest.mark.parametrize("width", [96, 77, 5128])
def test_extremes_of_the_alignment(width):
    case = seam(9, width, parts=(), student=True, norm=False)
    case.student[1] = 0
    case.x[2] = 0
    case.student[3, 2] = float("nan")
    case.x[4, 5] = float("inf")
    case.student[5] *= 1e30
    case.x[5] *= 1e30
    case.student[6] *= 1e30
    case.x[6] *= 1e-30  # below eps
    case.x[7] *= 1e-7 / case.x[7].norm()  # just below
    case.student[8], case.x[8] = 0, float("inf")
    alignment = case.check_forward(seeds=(0, 1)).alignment
    assert alignment[0].isnan().tolist() == [row in (3, 4, 8) for row in range(9)]
    for row in (1, 2, 6, 7):
        assert alignment[:, row].tolist() == [0, 0, 0]
    tiny = replace(case, x=case.x[:1] * 1e-30, student=case.student[:1] * 1e25, align_eps=1e-37)
    assert tiny.check_forward().alignment[0] != 0


@pytest.mark.parametrize("width", [96, 77])
def test_row_without_alignment_gradient_may_hold_anything(width):
    case = seam(4, width, groups=2)
    given = gradients(case, *EVERYTHING)
    given["factors"][:, 1] = 0
    given["other"][1] = float("nan")
    assert case.check_backward(**given).d_x.isfinite().all()


def test_gradients_near_the_ends_of_fp16():
    # Sums over rows are taken before anything is rounded: 64 gradients of 3e4 pass the largest fp16 value.
    case = seam(64, 8, stream=(HALF, HALF), parts=("branch", "gate", "scale"))
    case.branch = torch.ones_like(case.branch)
    d_residual = torch.full_like(case.x, 3e4)
    result = case.check_backward(d_residual=d_residual)
    assert (result.d_gate == 64 * 3e4).all()


# ---- gelu


def run_gelu(preactivation, gradient, *, activation=True, bias=True):
    """Activation, the gradient of the preactivation, the activation again and the column sums."""
    results = gelu.BACKWARD["cuda"](gradient, preactivation, activation, bias)
    return [gelu.FORWARD["cuda"](preactivation), *wanted_alone(results, (True, activation, bias))]


def check_gelu(preactivation, gradient, seeds=(0,), **kwargs):
    """Compare with autograd in double precision."""
    result = same_for_all(seeds, lambda: run_gelu(preactivation, gradient, **kwargs))
    u = preactivation.double().requires_grad_()
    exact = F.gelu(u, approximate="tanh")
    exact.backward(gradient.double())
    exact = exact.detach()
    activation, d_preactivation, again, d_bias = result
    slack = 4 * u.detach().abs().clamp(max=1)
    assert_close(activation, exact, slack)
    assert_close(d_preactivation, u.grad, 8 * gradient.double().abs())
    if again is not None:
        assert_close(again, exact, slack)
    if d_bias is not None:
        assert_close(d_bias, u.grad.sum(0), 16 * gradient.double().abs().sum(0))
    return result


@pytest.mark.parametrize("dtype", TYPES, ids=NAMES.get)
@pytest.mark.parametrize("width", [1, 77, 136, 1160, 1029])  # one tile and two, with vectors and without
def test_gelu_of_any_width(dtype, width):
    preactivation, gradient = rows_of(7, width, dtype=dtype, seed=1) * 3, rows_of(7, width, dtype=dtype, seed=2)
    check_gelu(preactivation, gradient)


def test_gelu_over_its_whole_range():
    near = torch.linspace(-12, 12, 4801)
    far = torch.tensor([1e-30, 1e-5, 30, 1e4, 1e12, 1e19, 1e30, 3e38])
    for preactivation in (near, far, -far):
        check_gelu(preactivation.unsqueeze(0), torch.ones(1, len(preactivation)))


def test_gelu_of_nan_and_infinity_as_in_pytorch():
    preactivation = torch.tensor([[float("nan"), 1, float("inf"), -1, -float("inf"), 2, 3, 4]])
    result = run_gelu(preactivation, torch.ones_like(preactivation))
    for output in result[:3]:
        assert output[0, [1, 3, 5, 6, 7]].isfinite().all()
        assert output[0, 0].isnan()
    assert torch.equal(result[0].isnan(), F.gelu(preactivation, approximate="tanh").isnan())


@pytest.mark.parametrize("rows", [16, 37, 600])  # one run of rows, three, and 38
def test_gelu_bias_sums_over_runs_of_rows(rows):
    check_gelu(rows_of(rows, 72, seed=1), rows_of(rows, 72, seed=2), seeds=(0, 1, 2))


@pytest.mark.parametrize(("activation", "bias"), [(False, False), (True, False), (False, True)])
def test_gelu_outputs_that_are_not_wanted(activation, bias):
    preactivation, gradient = rows_of(5, 72, dtype=BF16, seed=1), rows_of(5, 72, dtype=BF16, seed=2)
    result = check_gelu(preactivation, gradient, activation=activation, bias=bias)
    assert [output is None for output in result] == [False, False, not activation, not bias]


def test_gelu_of_strided_gradients_and_unaligned_tensors():
    preactivation = rows_of(6, 72, dtype=HALF, seed=1)
    for gradient in (
        rows_of(6, 80, dtype=HALF, seed=2)[:, :72],
        rows_of(6, 75, dtype=HALF, seed=3)[:, 1:73],
        rows_of(1, 72, dtype=HALF, seed=4).expand(6, 72),
    ):
        check_gelu(preactivation, gradient)
    unaligned = rows_of(6 * 72 + 1, dtype=HALF, seed=5)[1:].reshape(6, 72)
    check_gelu(unaligned, preactivation)
