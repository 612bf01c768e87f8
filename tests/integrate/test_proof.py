"""What a block has to be to be replaced: blocks that differ where a few tries would not see it, and honest ones."""

import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layersync_kernels.integrate.replace import apply_layersync_kernels

from .test_replace import HEADS, WIDTH, Denoiser, DiTBlock, batch, fused_blocks, modulate

SEEDS = range(30)
published = DiTBlock.forward


def block_of(forward, **attributes):
    """A block of the published parts, of a class of its own, with this forward."""
    block = DiTBlock()
    block.__class__ = type("Own", (nn.Module,), {"forward": forward})
    for name, value in attributes.items():
        setattr(block, name, value)
    return block


def verdict(block, **options):
    """Why it was left; None if it was replaced."""
    model = Denoiser(block)
    replacement = apply_layersync_kernels(model, **options)
    assert len(fused_blocks(model)) == len(replacement.replaced)
    return replacement.left.get("blocks.0")


# ---- random


def depth_of(draw):
    def forward(self, x, c):
        y = published(self, x, c)
        return x + draw(self, x) * (y - x) if self.training else y

    return forward


def coin(survival):
    return depth_of(lambda self, x: (torch.rand(len(x), 1, 1) > 1 - survival).to(x.dtype))


RANDOM = {
    "torch, p = .05": (coin(0.95), "torch"),
    "torch, p = .1": (coin(0.9), "torch"),
    "torch, p = .2": (coin(0.8), "torch"),
    "torch, p = .5": (coin(0.5), "torch"),
    "Python's": (depth_of(lambda self, x: random.random() > 0.01), "random"),
    "numpy's": (depth_of(lambda self, x: np.random.rand() > 0.01), r"numpy\.random"),
    "dropout in evaluation": (lambda self, x, c: F.dropout(published(self, x, c), 1e-6), "torch"),
}


@pytest.mark.parametrize("case", RANDOM)
@pytest.mark.filterwarnings("ignore:apply_layersync_kernels")
def test_a_random_block_is_left_whatever_it_draws(case):
    forward, generator = RANDOM[case]
    for seed in SEEDS:
        model = Denoiser(block_of(forward))
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        before = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        found = apply_layersync_kernels(model).left.get("blocks.0", "replaced")
        assert re.search(f"draws random numbers from {generator} ", found), found
        assert before == (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())


# ---- in some cases only


def where(applies, otherwise=lambda x: x * 1.5):
    def forward(self, x, c):
        y = published(self, x, c)
        return otherwise(y) if applies(x) else y

    return forward


def windowed(self, x, c):
    if x.shape[1] <= 64:
        return published(self, x, c)
    return torch.cat([published(self, part, c) for part in x.split(64, dim=1)], dim=1)


def clamped(self, x, c):
    return published(self, x, c).clamp(-1e9, 1e9)


def clamped_in_half(self, x, c):
    y = published(self, x, c)
    return y if y.dtype == torch.float64 else y.clamp(-6e4, 6e4)


def clipping_gradients(self, x, c):
    y = published(self, x, c)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient.clamp(-1e9, 1e9))
    return y


def with_a_frozen_layer(self, x, c):
    qkv = self.attn.qkv
    frozen = {"qkv.weight": qkv.weight.detach(), "qkv.bias": qkv.bias}

    def attention(y):
        return torch.func.functional_call(self.attn, frozen, y)

    shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + gate1.unsqueeze(1) * attention(modulate(self.norm1(x), shift1, scale1))
    return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


def eps_outside_of_the_root(self, x, c):
    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True).sqrt() + 1e-6)

    shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + gate1.unsqueeze(1) * self.attn(modulate(norm(x), shift1, scale1))
    return x + gate2.unsqueeze(1) * self.mlp(modulate(norm(x), shift2, scale2))


def in_place(self, x, c):
    y = published(self, x, c)
    return x.copy_(y) if not torch.is_grad_enabled() else y


SOMETIMES = {
    "windows above 64 tokens": (windowed, r"output differs .*3 x 65 tokens"),
    "above 300 tokens": (
        where(lambda x: x.shape[1] > 300),
        r"depends on the number of samples or tokens: .*tokens.*300",
    ),
    "odd token counts above 300": (where(lambda x: x.shape[1] > 300 and x.shape[1] % 2), r"depends on the number"),
    "batches of 8": (where(lambda x: len(x) == 8), r"depends on the number of samples or tokens: .*samples"),
    "a single token": (where(lambda x: x.shape[1] == 1), r"output differs .*1 x 1 tokens"),
    "clamp": (clamped, r"runs aten::clamp"),
    "clamp outside of fp64": (clamped_in_half, r"runs aten::clamp.*in (bfloat16|float32)"),
    "clamp of gradients": (clipping_gradients, r"runs aten::clamp"),
    "branch on values": (where(lambda x: float(x.detach().abs().amax()) > 1e9), r"runs aten::(abs|amax)"),
    "nan_to_num": (lambda self, x, c: torch.nan_to_num(published(self, x, c)), r"runs aten::nan_to_num"),
    "where": (lambda self, x, c: torch.where(x == 123.0, x, published(self, x, c)), r"runs aten::(eq|where)"),
    "bf16": (where(lambda x: x.dtype == torch.bfloat16), r"output differs .*bfloat16"),
    "fp32": (where(lambda x: x.dtype == torch.float32), r"output differs .*float32"),
    "autocast": (where(lambda x: torch.is_autocast_enabled("cpu")), r"output differs .*autocast"),
    "without grad": (where(lambda x: not torch.is_grad_enabled()), r"output differs .*evaluation"),
    "a frozen layer": (with_a_frozen_layer, r"gradient of attn\.qkv\.weight differs .* 1\.0e\+00"),
    "another eps": (eps_outside_of_the_root, r"gradient of x differs|output differs"),
    "its inputs in place": (in_place, r"changes its inputs in place"),
    "another dtype": (lambda self, x, c: published(self, x, c).float(), r"output is torch\.float32"),
    "another shape": (
        lambda self, x, c: published(self, x, c)[None],
        r"output has the shape \(1, 2, 16, 32\), not \(2, 16, 32\)",
    ),
}


@pytest.mark.parametrize("case", SOMETIMES)
@pytest.mark.filterwarnings("ignore:apply_layersync_kernels")
def test_a_block_that_differs_in_some_cases_is_left(case):
    forward, reason = SOMETIMES[case]
    assert re.search(reason, verdict(block_of(forward)) or "replaced")


def test_the_models_own_dtype_is_tried():
    model = Denoiser(block_of(where(lambda x: x.dtype == torch.float16))).half()
    with pytest.warns(UserWarning, match=r"output differs .*in float16"):
        apply_layersync_kernels(model)


# ---- what is kept on the side


class Log:
    def __init__(self):
        self.norms = []


def keeping(keep):
    def forward(self, x, c):
        y = published(self, x, c)
        keep(self, y)
        return y

    return forward


KEEPING = {
    "a map": (keeping(lambda self, y: setattr(self.attn, "attn_map", y.detach())), {}, r"sets attn\.attn_map,"),
    "a counter": (keeping(lambda self, y: setattr(self, "calls", self.calls + 1)), {"calls": 0}, "sets calls,"),
    "a list": (keeping(lambda self, y: self.seen.append(y.detach())), {"seen": []}, "sets seen,"),
    "a dictionary": (keeping(lambda self, y: self.seen.update(y=y.detach())), {"seen": {}}, "sets seen,"),
    "an object": (keeping(lambda self, y: self.log.norms.append(1)), {"log": Log()}, "sets log,"),
    "a tensor in place": (
        keeping(lambda self, y: self.total.copy_(y.detach().sum())), {"total": torch.zeros(())}, "sets total,",
    ),
    "numbers of a generator of its own": (
        depth_of(lambda self, x: self.dice.random() > 1e-9), {"dice": random.Random(0)}, "sets dice,",
    ),
    "numbers of numpy's": (
        depth_of(lambda self, x: self.dice.random() > 1e-9), {"dice": np.random.default_rng(0)}, "sets dice,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEEPING)
@pytest.mark.filterwarnings("ignore:apply_layersync_kernels")
def test_a_block_that_keeps_something_is_left(case):
    forward, attributes, reason = KEEPING[case]
    block = block_of(forward, **attributes)
    assert re.search(reason, verdict(block) or "replaced")
    assert not hasattr(block.attn, "attn_map"), "the model's own block was run"
    assert getattr(block, "calls", 0) == 0
    assert not getattr(block, "seen", None)


# ---- overridden forwards, and trust


class Overriding(DiTBlock):
    def forward(self, x, c):
        return super().forward(x, c)


class Pasted(DiTBlock):
    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """The source of DiT, over a block of another kind."""
        shift_a, scale_a, gate_a, shift_b, scale_b, gate_b = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        x = x + gate_b.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_b, scale_b))
        return x


class Longer(DiTBlock):
    """Not the source of DiT: a line more."""

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        x = x + 0
        return x


@pytest.mark.parametrize("kind", [Overriding, Longer])
def test_an_overridden_forward_is_left_unless_it_is_trusted(kind):
    with pytest.warns(UserWarning, match=rf"a {kind.__name__}, which overrides the forward of DiTBlock\. If .*trust="):
        apply_layersync_kernels(Denoiser(kind()))
    assert verdict(kind(), trust=[kind]) is None


def test_an_overridden_attention_is_left():
    block = DiTBlock()
    kind = type(block.attn)
    block.attn.__class__ = type("Mine", (kind,), {"forward": lambda self, x: kind.forward(self, x)})
    with pytest.warns(UserWarning, match="attn is a Mine, which overrides the forward of Attention"):
        apply_layersync_kernels(Denoiser(block))
    assert verdict(block, trust=[DiTBlock]) is None


def test_the_published_forward_is_known_by_its_source():
    assert verdict(Pasted()) is None


def test_trust_is_by_exact_type_and_of_no_use_to_what_is_seen_to_differ():
    class More(Overriding):
        pass

    assert "overrides" in verdict_of(More(), trust=[Overriding])
    for forward, reason in (RANDOM["torch, p = .05"], SOMETIMES["windows above 64 tokens"]):
        block = block_of(forward)
        assert re.search(reason, verdict_of(block, trust=[type(block)]))
    block = block_of(KEEPING["a map"][0])
    assert verdict(block, trust=[type(block)]) is None


def verdict_of(block, **options):
    with pytest.warns(UserWarning, match="replaced 0"):
        return verdict(block, **options) or "replaced"


@pytest.mark.parametrize("trust", [DiTBlock, [int], ["DiTBlock"], [DiTBlock()]])
def test_trust_takes_classes(trust):
    with pytest.raises(TypeError, match=r"expected classes of blocks, as in \[MyBlock\]"):
        apply_layersync_kernels(Denoiser(DiTBlock()), trust=trust)


# ---- honest blocks


class HandAttention(nn.Module):
    """Written out: einsum and softmax."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = HEADS, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).unbind(2)
        logits = torch.einsum("bnhe,bmhe->bhnm", q, k) / math.sqrt(d // self.num_heads)
        return self.proj(torch.einsum("bhnm,bmhe->bnhe", logits.softmax(-1), v).reshape(b, n, d))


class HandMlp(nn.Module):
    """GELU's tanh, written out."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def by_hand():
    block = DiTBlock()
    block.attn, block.mlp = HandAttention(), HandMlp()
    return block


def norm_in_fp32(self, x, c):
    def norm(x):
        return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)

    shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
    x = x + gate1.unsqueeze(1) * self.attn(modulate(norm(x), shift1, scale1))
    return x + gate2.unsqueeze(1) * self.mlp(modulate(norm(x), shift2, scale2))


def unfused():
    block = DiTBlock()
    block.attn.fused_attn = False
    return block


@torch.compile(backend="eager")
def compiled(self, x, c):
    return published(self, x, c)


HONEST = {
    "published": DiTBlock,
    "attention of timm, written out": unfused,
    "attention and MLP by hand": by_hand,
    "norms in fp32": lambda: block_of(norm_in_fp32),
    "compiled forward": lambda: block_of(compiled),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in HONEST),
        *((case, torch.bfloat16) for case in HONEST),
        ("published", torch.float16),
        ("published", torch.float64),
    ],
)
def test_an_honest_block_is_replaced(case, dtype):
    model = Denoiser(HONEST[case]()).to(dtype)
    state = torch.get_rng_state()
    replacement = apply_layersync_kernels(model)
    assert list(replacement.replaced) == ["blocks.0"], replacement
    assert torch.equal(torch.get_rng_state(), state)
    assert model(*batch(dtype)).dtype == dtype
