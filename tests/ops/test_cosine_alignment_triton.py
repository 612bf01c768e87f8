"""What only the Triton route can get wrong. Its numbers are tested with all backends in test_cosine_alignment.py."""

import os
import subprocess
import sys

import pytest
import torch

from layersync_kernels.ops.cosine_alignment.op import REDUCTIONS

from ..support import specialisations

shared = pytest.importorskip("layersync_kernels.ops.tiles", reason="triton is not installed")
triton_route = pytest.importorskip("layersync_kernels.ops.cosine_alignment.triton", reason="triton is not installed")

COUNT_SPECIALISATIONS = """
import torch
from layersync_kernels.ops.cosine_alignment import triton as route
from tests.support.specialisations import watch

counts = watch(route)

def zeros(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)

def run(student, teacher):
    weight = torch.ones(student.shape[:-1].numel())
    loss, stats, scale = route.forward(student, teacher, weight, 1e-6, 1)
    route.backward(torch.ones(()), student, teacher, weight, stats, scale, True, False)

for batch, tokens in ((1, 1), (1, 7), (2, 16), (3, 255), (16, 256), (1, 70000)):
    run(zeros(batch, tokens, 64), zeros(batch, tokens, 64))
    run(zeros(batch, tokens + 1, 64)[:, 1:], zeros(tokens, batch, 64).transpose(0, 1))
print(*counts())
run(zeros(2, 3, 65)[..., :64], zeros(2, 3, 64))
print(*counts())
"""


def test_neither_batch_nor_tokens_nor_strides_recompile(tmp_path):
    everywhere, with_unaligned_rows = specialisations.run(COUNT_SPECIALISATIONS, tmp_path)
    assert everywhere == "1 1 1"
    assert with_unaligned_rows == "2 1 2"


def test_import_does_not_touch_triton():
    code = "import sys, layersync_kernels; assert 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("width", [1, 8, 96, 256, 257, 2048, 2049, 20000, 1_000_000])
def test_tile_covers_the_width_in_a_bounded_number_of_steps(width):
    tile = triton_route.tile_for(width)
    assert tile.rows * tile.block <= 1024 or tile.rows == 1
    assert -(-width // tile.block) <= 32


@pytest.mark.parametrize(
    ("tensor", "vector"),
    [
        (torch.zeros(4, 64), 4),
        (torch.zeros(4, 64, dtype=torch.bfloat16), 8),
        (torch.zeros(4, 68, dtype=torch.bfloat16)[:, :64], 1),
        (torch.zeros(4, 68)[:, :64], 4),
        (torch.zeros(4, 3, 65)[..., :64], 1),
        (torch.zeros(64).expand(4, 64), 4),
    ],
)
def test_vector_is_what_every_row_start_allows(tensor, vector):
    assert shared.operand(tensor).vector == vector


def test_many_partials_are_summed_in_several_steps(monkeypatch):
    # 65 programs of 4 rows, 16 partials a step: the loop over partials, with a rest.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was imported without its interpreter, and there is no GPU")
    monkeypatch.setattr(triton_route, "_FINISH_BLOCK", 16)
    student, teacher = torch.randn(257, 256, device=device), torch.randn(257, 256, device=device)
    loss, _, scale = triton_route.forward(student, teacher, None, 1e-6, REDUCTIONS["mean"])
    exact = -torch.cosine_similarity(student.double(), teacher.double(), dim=-1).mean()
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=1e-7)
    torch.testing.assert_close(scale.item(), 1 / 257)
