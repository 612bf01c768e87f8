"""What only the Triton route of the block ops can get wrong. Their numbers are tested with all backends."""

import os

import pytest
import torch
import torch.nn.functional as F

from layersync_kernels.ops.cosine_alignment.op import REDUCTIONS

from ..support import specialisations

pytest.importorskip("triton", reason="triton is not installed")

from layersync_kernels.ops import tiles as shared
from layersync_kernels.ops.cosine_alignment import triton as cosine_alignment
from layersync_kernels.ops.gated_residual_norm import triton as gated_residual_norm
from layersync_kernels.ops.gelu import triton as gelu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = [1, 8, 96, 256, 257, 768, 769, 2048, 2049, 20000, 1_000_000]

runs_here = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton was imported without its interpreter, and there is no GPU",
)

COUNT_SPECIALISATIONS = """
import torch
from layersync_kernels.ops import tiles
from layersync_kernels.ops.gated_residual_norm import triton as norm
from layersync_kernels.ops.gelu import triton as gelu
from tests.support.specialisations import watch

counts = watch(norm), watch(gelu), watch(tiles)

def zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)

def run(x, branch, modulation):
    gate, shift, scale = modulation.chunk(3, dim=-1)
    groups = modulation.shape[0]
    residual, normed, stats, _ = norm.forward(
        x, branch, gate, shift, scale, branch, True, False, 1e-6, 1e-6, torch.bfloat16
    )
    factors = torch.zeros(2, x.shape[:-1].numel())
    norm.backward(residual, branch, residual, branch, gate, scale, stats, x, factors, False, groups, True)
    gelu.forward(residual.view(-1, 64))
    gelu.backward(residual.view(-1, 64), residual.view(-1, 64), True, True)

for batch, tokens in ((1, 1), (1, 7), (2, 16), (3, 255), (16, 256), (1, 70000)):
    run(zeros(batch, tokens, 64), zeros(batch, tokens, 64), zeros(batch, 3 * 64))
    run(zeros(batch, tokens + 1, 64)[:, 1:], zeros(tokens, batch, 64).transpose(0, 1), zeros(batch, 6 * 64)[:, 192:])
    per_token = zeros(1, 3 * 64).expand(batch * tokens, -1)
    run(zeros(batch, tokens, 64), zeros(batch, 1, 64).expand(-1, tokens, -1), per_token)
print(*(count for counter in counts for count in counter()))
"""


def test_neither_batch_nor_tokens_nor_strides_recompile(tmp_path):
    (counts,) = specialisations.run(COUNT_SPECIALISATIONS, tmp_path)
    assert counts == "1 1 1 1 1"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tile_for", [gated_residual_norm.run_tile_for, shared.column_tile_for], ids=["norm", "gelu"])
def test_tile_covers_the_width_within_bounds(tile_for, width):
    tile = tile_for(width)
    assert tile.rows * tile.block <= 1024 or tile.rows == 1
    if tile_for is gated_residual_norm.run_tile_for:  # its steps are unrolled
        assert -(-width // tile.block) <= 32
        assert width > 12288 or -(-width // tile.block) * tile.block <= 24 * 32 * tile.warps  # in registers


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 255, 256, 65536, 10_000_000])
@pytest.mark.parametrize("programs", [1, 18, 256, 100_000])
def test_runs_cover_every_row_once_and_none_is_empty(rows, programs):
    run = shared.runs_of(rows, programs, 528)
    assert (run.parts - 1) * run.length < rows <= run.parts * run.length
    assert run.parts == 1 or run.parts * programs <= 528


@runs_here
def test_many_partials_are_summed_in_several_steps():
    # 34 runs of 16 rows, 32 partials a step: the loop over partials, with a rest, and a last run of 5 rows.
    groups, rows, width = 2, 33 * 16 + 5, 24
    dy, r = torch.randn(groups, rows, width, device=DEVICE), torch.randn(groups, rows, width, device=DEVICE)
    scale = torch.randn(groups, width, device=DEVICE)
    _, _, stats, _ = gated_residual_norm.forward(r, None, None, None, scale, None, True, False, 1e-6, 1e-6, r.dtype)
    *_, shift_sum, scale_sum, _ = gated_residual_norm.backward(
        None, dy, r, None, None, scale, stats, None, None, False, groups, False
    )
    unit = F.layer_norm(r.double(), (width,), eps=1e-6)
    torch.testing.assert_close(shift_sum.double(), dy.double().sum(1), rtol=0, atol=2e-5)
    torch.testing.assert_close(scale_sum.double(), (dy * unit).sum(1), rtol=0, atol=2e-5)

    u = r[0].double().requires_grad_()
    (exact,) = torch.autograd.grad(F.gelu(u, approximate="tanh"), u, dy[0].double())
    _, _, bias_sum = gelu.backward(dy[0], r[0], False, True)
    torch.testing.assert_close(bias_sum.double(), exact.sum(0), rtol=0, atol=2e-5)


@runs_here
@pytest.mark.parametrize("width", [96, 300, 2100])  # several rows in a program, one with steps, a block for one
def test_alignment_is_that_of_cosine_alignment_bit_for_bit(width):
    special = [1.0, 1e30, 1e-25, 0.0, float("inf"), float("nan")]
    factors = torch.tensor([(s, t) for s in special for t in special], device=DEVICE)
    student, x = (torch.randn(len(factors), width, device=DEVICE) for _ in range(2))
    student, x = student * factors[:, :1], x * factors[:, 1:]
    _, _, _, alignment = gated_residual_norm.forward(
        x, None, None, None, None, student, False, False, 1e-6, 1e-30, x.dtype
    )
    _, expected, _ = cosine_alignment.forward(student, x, None, 1e-30, REDUCTIONS["none"])
    assert torch.equal(alignment.view(torch.int32), expected.view(torch.int32))


@runs_here
def test_gelu_of_values_whose_exponential_or_square_overflows():
    u = torch.tensor([[1e30, -1e30, 3e38, -3e38, 30.0, -30.0, 0.0]], device=DEVICE)
    activation = gelu.forward(u)
    torch.testing.assert_close(activation, F.gelu(u, approximate="tanh"), rtol=0, atol=0)
    gradient, again, _ = gelu.backward(torch.ones_like(u), u, True, False)
    assert torch.equal(again, activation)
    assert gradient.tolist() == [[1, 0, 1, 0, 1, 0, 0.5]]  # torch's own is NaN in fp32 from 1e19 on
