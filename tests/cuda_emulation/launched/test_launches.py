"""What every launcher does around its kernels: how many it launches, on which card, and what it says when it cannot."""

from __future__ import annotations

import importlib

import pytest
import torch

from layersync_kernels import functional as F
from layersync_kernels.ops import registry
from layersync_kernels.ops.cosine_alignment import op as cosine
from layersync_kernels.ops.gated_residual_norm import op as seam
from layersync_kernels.ops.gelu import op as gelu
from layersync_kernels.ops.gram_alignment import op as gram
from layersync_kernels.ops.qk_norm_rope import op as qk
from layersync_kernels.ops.spatial_norm import op as spatial
from layersync_kernels.ops.swiglu import op as swiglu

from .. import launchers
from .harness import BF16, rows_of

COMPILED = [raw for op in registry.ops() for raw in op.raw_ops if "cuda" in raw.overloads and "cuda" not in raw.python]


def launches(call):
    """How many kernels a call launches."""
    before = launchers.library().emulation_launches()
    call()
    return launchers.library().emulation_launches() - before


def samples(raw):
    """Arguments of a raw op, as its own test file has them."""
    module = importlib.import_module(f"tests.ops.test_{raw.op}")
    return [arguments for name, arguments in module.raw_samples("cuda") if name == raw.name]


@pytest.fixture(autouse=True)
def _guards_are_given_back():
    yield
    assert launchers.library().emulation_guards() == 0


X, HALF_X = rows_of(4, 32, 64), rows_of(4, 32, 64, dtype=BF16)
MODULATION = rows_of(4, 64, dtype=BF16)
HEADS = [rows_of(4, 2, 32, 8)] * 3
UNIT, ANGLES = [rows_of(8)] * 2, [rows_of(32, 8)] * 2


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda: cosine.FORWARD["cuda"](X, HALF_X, None, 1e-6, cosine.REDUCTIONS["mean"]), 2),
        (lambda: cosine.FORWARD["cuda"](X, HALF_X, None, 1e-6, cosine.REDUCTIONS["none"]), 1),
        (lambda: seam.FORWARD["cuda"](X, HALF_X, *[MODULATION] * 3, X, True, False, 1e-6, 1e-6, BF16), 1),
        (lambda: gelu.FORWARD["cuda"](X.flatten(0, 1)), 1),
        (lambda: gelu.BACKWARD["cuda"](X[0][:16], X[0][:16], True, True), 1),
        (lambda: gelu.BACKWARD["cuda"](X.flatten(0, 1), X.flatten(0, 1), True, False), 1),
        (lambda: gelu.BACKWARD["cuda"](X.flatten(0, 1), X.flatten(0, 1), True, True), 2),  # and the sums of runs
        (lambda: gram.STRIP["cuda"](X.clone(), 3, 0.1, 0, None), 1),
        (lambda: spatial.SPATIAL_NORM["cuda"](X, 1.0, 1e-6), 1),
        (lambda: qk.FORWARD["cuda"](X[..., :48], None, None, *ANGLES, 2, 1e-6, False, True), 1),
        (lambda: qk.BACKWARD["cuda"](*HEADS, None, None, None, *ANGLES, 1e-6, False, True, False, False), 1),
        # And the sums of runs, and those of heads.
        (lambda: qk.BACKWARD["cuda"](*HEADS, X[..., :48], *UNIT, *ANGLES, 1e-6, False, True, True, True), 3),
        (lambda: swiglu.FORWARD["cuda"](X, False, False), 1),
        (lambda: swiglu.BACKWARD["cuda"](X[..., :32], X, False, False, True, False), 1),
        (lambda: swiglu.BACKWARD["cuda"](X[..., :32], X, False, False, True, True), 2),  # and the sums of runs
    ],
    ids=[
        "cosine",
        "cosine-none",
        "seam",
        "gelu",
        "gelu-bias",
        "gelu-no-bias",
        "gelu-sums",
        "gram",
        "spatial",
        "qk",
        "qk-rope",
        "qk-sums",
        "swiglu",
        "swiglu-no-bias",
        "swiglu-sums",
    ],
)
def test_kernels_of_a_raw_op(call, count):
    assert launches(call) == count


@pytest.mark.parametrize(
    ("function", "forward", "backward"),
    [
        (lambda x: F.layersync_loss(x, HALF_X.float(), backend="cuda"), 2, 1),
        (lambda x: F.gated_residual_norm(x, X, *[MODULATION.float()] * 3, backend="cuda")[1], 1, 1),
        (lambda x: F.modulated_layer_norm(x, MODULATION.float(), None, backend="cuda"), 1, 1),
        (lambda x: F.linear_gelu(x, X[0], None, backend="cuda"), 1, 1),
        (lambda x: F.swiglu(x, backend="cuda"), 1, 1),
    ],
    ids=["layersync_loss", "gated_residual_norm", "modulated_layer_norm", "linear_gelu", "swiglu"],
)
def test_kernels_of_a_function_and_its_gradient(function, forward, backward):
    leaf = X.clone().requires_grad_()
    output = []
    assert launches(lambda: output.append(function(leaf))) == forward
    gradient = torch.ones_like(output[0])
    assert launches(lambda: torch.autograd.grad(output[0], leaf, gradient)) == backward


def test_nothing_is_launched_for_no_elements():
    nothing = X[:0]
    assert launches(lambda: spatial.SPATIAL_NORM["cuda"](nothing, 1.0, 1e-6)) == 0
    assert launches(lambda: gelu.FORWARD["cuda"](nothing.flatten(0, 1))) == 0
    assert launches(lambda: gelu.BACKWARD["cuda"](nothing.flatten(0, 1), nothing.flatten(0, 1), True, True)) == 0
    assert launches(lambda: swiglu.BACKWARD["cuda"](nothing[..., :32], nothing, False, False, True, True)) == 0
    assert launches(lambda: gram.STRIP["cuda"](nothing, 3, 0.1, 0, None)) == 0
    call = seam.FORWARD["cuda"]
    assert launches(lambda: call(nothing, nothing, *[None] * 3, nothing, True, False, 1e-6, 1e-6, torch.float32)) == 0


@pytest.mark.parametrize("raw", COMPILED, ids=lambda raw: raw.name)
def test_every_launcher_follows_its_tensors_to_their_card(raw):
    """The guard and the stream are those of the tensors' card, or the launch fails."""
    for arguments in samples(raw):
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        expected = raw.overloads["cuda"](*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))
        with launchers.placed({5: tensors}):
            found = raw.overloads["cuda"](*arguments)
        for one, other in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (found, expected)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("raw", COMPILED, ids=lambda raw: raw.name)
def test_every_launcher_refuses_tensors_of_two_cards(raw):
    for arguments in samples(raw):
        tensors = [value for value in arguments if isinstance(value, torch.Tensor) and value.numel()]
        for other in tensors[1:]:
            if other.data_ptr() == tensors[0].data_ptr():
                continue
            with launchers.placed({3: [other]}), pytest.raises(RuntimeError, match="must be on the same GPU"):
                raw.overloads["cuda"](*arguments)


def test_a_launch_that_fails_names_kernel_and_cause_and_leaves_no_error_behind():
    library = launchers.library()
    no_kernel_image = 209
    library.emulation_fail_next_launch(no_kernel_image)
    with pytest.raises(
        RuntimeError,
        match=r"spatial_norm could not be launched: no kernel image is available .*TORCH_CUDA_ARCH_LIST",
    ):
        spatial.SPATIAL_NORM["cuda"](X, 1.0, 1e-6)
    assert library.emulation_last_error() == 0
    library.emulation_fail_next_launch(1)
    with pytest.raises(RuntimeError, match=r"gelu_forward could not be launched: an error of the emulation's$"):
        gelu.FORWARD["cuda"](X.flatten(0, 1))
    assert library.emulation_last_error() == 0
    gelu.FORWARD["cuda"](X.flatten(0, 1))
