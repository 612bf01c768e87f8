"""LightningDiT's blocks replaced by fused ones: every option that can be, and the reason where one cannot."""

import copy
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layersync_kernels.integrate.replace import apply_layersync_kernels
from layersync_kernels.integrate.rotary import RotaryBlock

from .lightning import (
    DEPTH,
    GRID,
    HEADS,
    WIDTH,
    CompiledBlock,
    LightningDiT,
    LightningDiTBlock,
    RMSNorm,
    VisionRotaryEmbeddingFast,
    batch,
)
from .test_replace import assert_same_gradients, train_step

REPLACED = {f"blocks.{i}": "LightningDiTBlock" for i in range(DEPTH)}
OPTIONS = {
    "published": {},
    "no rope": {"use_rope": False},
    "no qk norm": {"use_qknorm": False},
    "gelu": {"use_swiglu": False},
    "layer norm": {"use_rmsnorm": False, "use_qknorm": False},
    "plain": {"use_rmsnorm": False, "use_qknorm": False, "use_swiglu": False, "use_rope": False},
}


def both(**options):
    """An eager model and a copy with fused blocks."""
    eager = LightningDiT(**options)
    model = copy.deepcopy(eager)
    replacement = apply_layersync_kernels(model)
    assert replacement.replaced == REPLACED, replacement
    assert all(type(block) is RotaryBlock for block in model.blocks)
    return eager, model, replacement


@functools.cache
def proven():
    return both()[:2]


def published():
    """An eager model and a fused one, the proof being of another test."""
    return copy.deepcopy(proven())


@pytest.mark.parametrize("case", OPTIONS)
def test_training_is_that_of_the_eager_blocks(case):
    eager, model, replacement = both(**OPTIONS[case])
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (eager, model)]
    keys = list(eager.state_dict())
    for _ in range(3):
        inputs = batch()
        expected, out = (train_step(m, o, inputs) for m, o in zip((eager, model), optimizers, strict=True))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert_same_gradients(model, eager, atol=1e-4)
    assert list(model.state_dict()) == keys
    expected = model(*inputs)
    replacement.undo()
    assert [type(block) for block in model.blocks] == [LightningDiTBlock] * DEPTH
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-4)


def test_bf16_autocast_and_a_model_in_bf16_are_as_exact_as_the_eager_blocks():
    eager, model = published()
    inputs = batch()
    truth = copy.deepcopy(eager).double()(*(t.double() for t in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(m(*inputs) - truth).abs().mean() for m in (model, eager)]
    assert errors[0] < 1.5 * errors[1]
    halves = [t.bfloat16() for t in inputs]
    errors = [(m.bfloat16()(*halves) - truth).abs().mean() for m in (model, eager)]  # with the tables of positions
    assert errors[0] < 1.5 * errors[1]


def test_the_norms_are_shared_with_the_old_blocks_whatever_is_loaded():
    model = LightningDiT()
    replacement = apply_layersync_kernels(model)
    model.load_state_dict({k: torch.full_like(v, 0.5) for k, v in model.state_dict().items()}, assign=True)
    model.double()
    replacement.undo()
    assert all(p.dtype == torch.float64 and (p == 0.5).all() for p in model.parameters())


def test_positions_of_another_resolution_are_turned_by():
    """Tables are read in each call: a second module of the class, as for larger pictures."""
    eager, model = published()
    rope = VisionRotaryEmbeddingFast(WIDTH // HEADS // 2, 3)
    x, c = torch.randn(2, 9, WIDTH), torch.randn(2, WIDTH)
    torch.testing.assert_close(model.blocks[0](x, c, rope), eager.blocks[0](x, c, rope), rtol=1e-4, atol=1e-4)


def test_unknown_positions_are_refused():
    _, model = published()
    x, c = torch.randn(2, GRID**2, WIDTH), torch.randn(2, WIDTH)
    with pytest.raises(TypeError, match=r"got a Identity as feat_rope.*expected VisionRotaryEmbeddingFast"):
        model.blocks[0](x, c, nn.Identity())


def test_a_compiled_forward_and_one_graph():
    model, inputs = LightningDiT(block=CompiledBlock), batch()
    assert len(apply_layersync_kernels(model).replaced) == DEPTH
    expected = model(*inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-4)


# ---- what is left


class HalfRotation(VisionRotaryEmbeddingFast):
    """The channels half a head apart turn, as in language models."""

    def forward(self, t):
        first, second = t.chunk(2, dim=-1)
        return t * self.freqs_cos + torch.cat((-second, first), dim=-1) * self.freqs_sin


class Counting(VisionRotaryEmbeddingFast):
    calls = 0

    def forward(self, t):
        self.calls = self.calls + 1
        return super().forward(t)


class Windowed(VisionRotaryEmbeddingFast):
    def forward(self, t):
        return super().forward(t) if t.shape[2] <= 300 else t


class Centred(RMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class TurnedValues(LightningDiTBlock):
    def forward(self, x, c, feat_rope=None):
        return super().forward(x, c, feat_rope) * (1 if feat_rope is None else 2)


class Masked(LightningDiTBlock):
    def forward(self, x, c, mask=None):
        return super().forward(x, c)


def with_rope(kind):
    model = LightningDiT()
    model.feat_rope = kind(WIDTH // HEADS // 2, GRID)
    return model


def with_norm(path, norm):
    model = LightningDiT()
    for block in model.blocks:
        block.set_submodule(path, norm)
    return model


def without_positions():
    model = LightningDiT(use_rope=False)
    del model.feat_rope
    return model


HEAD = WIDTH // HEADS
LEFT = {
    "no shifts": (lambda: LightningDiT(wo_shift=True), r"modulation has no shifts \(wo_shift\)"),
    "LayerNorm of heads": (lambda: LightningDiT(use_rmsnorm=False), r"attn\.q_norm is LayerNorm"),
    "other pairs": (lambda: with_rope(HalfRotation), r"output differs"),
    "positions that keep something": (lambda: with_rope(Counting), r"forward sets calls,"),
    "positions that ask for the size": (lambda: with_rope(Windowed), r"depends on the number of .*tokens"),
    "positions that do more": (lambda: LightningDiT(block=TurnedValues), r"output differs"),
    "positions of an unknown kind": (without_positions, r"takes feat_rope, and the model holds none"),
    "another third argument": (lambda: LightningDiT(block=Masked, use_rope=False), r"takes \(x, c, mask=None\)"),
    "norm of another kind": (lambda: with_norm("norm1", Centred(WIDTH)), r"output differs"),
    "head norm of another kind": (lambda: with_norm("attn.q_norm", Centred(HEAD)), r"output differs"),
    "norm without an eps": (lambda: with_norm("norm2", nn.RMSNorm(WIDTH)), r"norm2\.eps is None"),
    "one norm of two": (lambda: with_norm("attn.k_norm", nn.Identity()), r"differ .* in attn\.k_norm\.weight"),
    "a norm of another width": (
        lambda: with_norm("attn.k_norm", RMSNorm(1)),
        r"attn\.k_norm\.weight has the shape \(1,\), not \(16,\)",
    ),
}


@pytest.mark.parametrize("case", LEFT)
@pytest.mark.filterwarnings("ignore:apply_layersync_kernels")
def test_what_differs_is_left(case):
    make, reason = LEFT[case]
    replacement = apply_layersync_kernels(make())
    assert not replacement.replaced
    (found,) = set(replacement.left.values())
    assert re.search(reason, found), found


def test_torchs_own_rms_norm_is_taken():
    model = LightningDiT()
    for block in model.blocks:
        for path, width in (("norm1", WIDTH), ("norm2", WIDTH), ("attn.q_norm", HEAD), ("attn.k_norm", HEAD)):
            block.set_submodule(path, nn.RMSNorm(width, eps=1e-5))
    inputs = batch()
    expected = model(*inputs)
    assert apply_layersync_kernels(model).replaced == REPLACED
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-4)


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.5 * F.silu(x).mean(-1, keepdim=True)


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1"])
def test_lora_added_to_a_fused_block_has_an_effect(layer):
    eager, model = published()
    for m in (eager, model):
        linear = m.blocks[0].get_submodule(layer)
        adapted = Adapted(linear.in_features, linear.out_features)
        adapted.load_state_dict(linear.state_dict())
        m.blocks[0].set_submodule(layer, adapted)
    inputs = batch()
    expected = eager(*inputs)
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-4)
