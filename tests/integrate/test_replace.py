"""Fused blocks in models written as the published ones are, from timm's attention and MLP, and what must be left."""

import copy
import logging
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from layersync_kernels.integrate import replace
from layersync_kernels.integrate.replace import apply_layersync_kernels
from layersync_kernels.modules.block import AdaLNZeroBlock
from layersync_kernels.sit import SiT

timm = pytest.importorskip("timm.models.vision_transformer")

WIDTH, HEADS, DEPTH, TOKENS = 32, 2, 3, 16


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """Built from the parts that the published SiT, DiT and REPA take from timm."""

    def __init__(self, activation=lambda: nn.GELU(approximate="tanh"), drop=0.0, eps=1e-6, affine=False, **attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=affine, eps=eps)
        self.attn = timm.Attention(WIDTH, num_heads=HEADS, **{"qkv_bias": True, **attention})
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=affine, eps=eps)
        self.mlp = timm.Mlp(WIDTH, 4 * WIDTH, act_layer=activation, drop=drop)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_final = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(WIDTH, 4)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x, c):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class Denoiser(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.embedder = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(blocks or [DiTBlock() for _ in range(DEPTH)])
        self.final_layer = FinalLayer()

    def forward(self, x, c):
        x = self.embedder(x)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def batch(dtype=torch.float32):
    return torch.randn(2, TOKENS, 4, dtype=dtype), torch.randn(2, WIDTH, dtype=dtype)


def train_step(model, optimizer, inputs):
    optimizer.zero_grad()
    out = model(*inputs)
    out.float().square().mean().backward()
    optimizer.step()
    return out.detach()


def assert_same_gradients(model, other, atol=1e-5):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def ours(caplog):
    """Records of this package; torch's tracing leaves some of its own."""
    return [record for record in caplog.records if record.name.startswith("layersync_kernels")]


def fused_blocks(model):
    return [module for module in model.modules() if isinstance(module, AdaLNZeroBlock)]


# ---- what is computed


@pytest.mark.parametrize("recompute", ["none", "light", "full"])
def test_training_is_that_of_the_eager_blocks(recompute):
    eager = Denoiser()
    model = copy.deepcopy(eager)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (eager, model)]
    replacement = apply_layersync_kernels(model, recompute=recompute)
    assert replacement.replaced == {f"blocks.{i}": "DiTBlock" for i in range(DEPTH)}
    assert not replacement.left
    assert [block.recompute for block in fused_blocks(model)] == [recompute] * DEPTH
    for _ in range(4):
        inputs = batch()
        expected, out = (train_step(m, o, inputs) for m, o in zip((eager, model), optimizers, strict=True))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert_same_gradients(model, eager)


def test_bf16_autocast_is_as_exact_as_the_eager_blocks():
    eager = Denoiser()
    model, truth = copy.deepcopy(eager), copy.deepcopy(eager).double()
    apply_layersync_kernels(model)
    inputs = batch()
    expected = truth(*(t.double() for t in inputs))
    expected.square().mean().backward()
    for m in (eager, model):
        with torch.autocast("cpu", torch.bfloat16):
            out = m(*inputs)
        out.float().square().mean().backward()
        m.error = (out - expected).abs().mean()
    assert model.error < 1.5 * eager.error
    for (name, p), q, exact in zip(model.named_parameters(), eager.parameters(), truth.parameters(), strict=True):
        error, eagers = ((grad - exact.grad).norm() / exact.grad.norm() for grad in (p.grad, q.grad))
        assert error < 1.5 * eagers + 2e-3, name


def test_an_eps_other_than_the_published_one_is_kept():
    model = Denoiser(DiTBlock(eps=1e-2))
    inputs = batch()
    expected = model(*inputs)
    assert apply_layersync_kernels(model).replaced
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_our_own_eager_model_is_replaced():
    model = SiT(4, 2, 4, hidden_size=WIDTH, depth=2, num_heads=2, num_classes=3, kernels="eager").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 2])
    expected, states = model(*inputs, capture=[1])
    assert len(apply_layersync_kernels(model).replaced) == 2
    out, captured = model(*inputs, capture=[1])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(captured[1], states[1], rtol=1e-5, atol=1e-5)


# ---- what stays as it was


def test_the_optimiser_built_before_trains_on_and_undo_gives_the_trained_blocks_back():
    model = Denoiser()
    old, parameters, keys = list(model.blocks), list(model.named_parameters()), list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with apply_layersync_kernels(model) as replacement:
        assert len(fused_blocks(model)) == DEPTH
        assert list(model.state_dict()) == keys
        now = list(model.named_parameters())
        assert all(a == b and p is q for (a, p), (b, q) in zip(now, parameters, strict=True))
        before = {name: p.detach().clone() for name, p in parameters}
        for _ in range(2):
            train_step(model, optimizer, batch())
        trained = copy.deepcopy(model.state_dict())
        assert not any(torch.equal(p, before[name]) for name, p in parameters)
        inputs = batch()
        expected = model(*inputs)
        model.eval()
    assert list(model.blocks) == old
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), trained, rtol=0, atol=0)
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-5, atol=1e-5)
    replacement.undo()
    assert list(model.blocks) == old
    assert replacement.replaced, "the record outlives the blocks"


def test_checkpoints_load_both_ways(tmp_path):
    eager, model = Denoiser(), Denoiser()
    apply_layersync_kernels(model)
    inputs = batch()
    for source, target in ((eager, model), (model, eager)):
        for parameter in source.parameters():
            nn.init.normal_(parameter, std=0.2)
        torch.save(source.state_dict(), tmp_path / "weights.pt")
        target.load_state_dict(torch.load(tmp_path / "weights.pt"), strict=True)
        torch.testing.assert_close(source(*inputs), target(*inputs), rtol=1e-5, atol=1e-5)


def test_loading_by_assignment_or_changing_the_dtype_reaches_the_old_blocks_too():
    model = Denoiser()
    replacement = apply_layersync_kernels(model)
    model.load_state_dict({k: torch.full_like(v, 0.5) for k, v in model.state_dict().items()}, assign=True)
    model.double()
    replacement.undo()
    assert all(p.dtype == torch.float64 and (p == 0.5).all() for p in model.parameters())


def test_mode_frozen_parameters_and_dtype_are_kept():
    model = Denoiser().to(torch.bfloat16).eval()
    model.blocks[1].requires_grad_(False)
    model.blocks[2].train()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    apply_layersync_kernels(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    assert [block.training for block in model.blocks] == [False, False, True]
    assert all(module.training == block.training for block in model.blocks for module in block.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_hooks_of_a_block_follow_it_there_and_back():
    model, seen = Denoiser(), []
    before = model.blocks[0].register_forward_hook(lambda *_: seen.append("before"))
    replacement = apply_layersync_kernels(model)
    assert not seen, "trying a block runs its hooks"
    after = model.blocks[0].register_full_backward_hook(lambda *_: seen.append("after"))

    def run():
        seen.clear()
        model(*batch()).sum().backward()
        return list(seen)

    assert run() == ["before", "after"]
    replacement.undo()
    assert run() == ["before", "after"]
    before.remove()
    after.remove()
    assert run() == []


def test_a_block_at_two_paths_stays_one():
    block = DiTBlock()
    model = Denoiser(block, DiTBlock(), block)
    replacement = apply_layersync_kernels(model)
    assert set(replacement.replaced) == {"blocks.0", "blocks.1", "blocks.2"}
    assert model.blocks[0] is model.blocks[2]
    replacement.undo()
    assert model.blocks[0] is model.blocks[2] is block


class Dropping(DiTBlock):
    def forward(self, x, c):
        return F.dropout(super().forward(x, c), 0.1, self.training)


@pytest.mark.parametrize("block", [DiTBlock, Dropping])
def test_the_random_numbers_to_come_are_unchanged(block):
    model = Denoiser(DiTBlock(), block())
    state = torch.get_rng_state()
    apply_layersync_kernels(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_ema_copy_has_its_own_fused_blocks():
    model = Denoiser()
    apply_layersync_kernels(model)
    ema, inputs = copy.deepcopy(model), batch()
    expected = ema(*inputs)
    nn.init.zeros_(model.blocks[0].mlp.fc1.weight)
    assert len(fused_blocks(ema)) == DEPTH
    assert torch.equal(ema(*inputs), expected)
    assert not torch.equal(model(*inputs), expected)


def test_a_model_on_the_meta_device_is_replaced_before_it_has_values():
    with torch.device("meta"):
        model = Denoiser()
    replacement = apply_layersync_kernels(model)
    assert len(replacement.replaced) == DEPTH
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    inputs = batch()
    out = model(*inputs)
    replacement.undo()
    torch.testing.assert_close(model(*inputs), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_does_not_matter(mode):
    model = Denoiser()
    with mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert len(apply_layersync_kernels(model).replaced) == DEPTH


# ---- what is left


class Erf(nn.Module):
    def forward(self, x):
        return F.gelu(x)


class ErfMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class CausalAttention(timm.Attention):
    def forward(self, x):
        return super().forward(x, is_causal=True)


class StopGradient(DiTBlock):
    def forward(self, x, c):
        return super().forward(x, c.detach())


class Sandwich(DiTBlock):
    def forward(self, x, c):
        return super().forward(x, c), c


class Rotary(DiTBlock):
    def forward(self, x, c, rope=None):
        return super().forward(x, c)


class LoRALinear(nn.Linear):
    """Its result is not that of its weight and bias alone."""

    def forward(self, x):
        return super().forward(x) + 0.5 * x.mean(-1, keepdim=True)


def changed(change):
    block = DiTBlock()
    change(block)
    return block


def patch_forward(block):
    forward = block.attn.forward
    block.attn.forward = lambda x: forward(x)


ODD = {
    "exact GELU": (lambda: DiTBlock(activation=nn.GELU), r"mlp\.act is GELU\(approximate='none'\)"),
    "own activation": (lambda: DiTBlock(activation=Erf), r"mlp\.act is Erf"),
    "exact GELU inside of an MLP": (
        lambda: changed(lambda b: setattr(b, "mlp", ErfMlp())),
        r"output differs .* 1\.\de-04",
    ),
    "qk-norm": (lambda: DiTBlock(qk_norm=True, norm_layer=nn.LayerNorm), r"attn\.q_norm is LayerNorm"),
    "dropout of attention": (lambda: DiTBlock(attn_drop=0.1), r"attn\.attn_drop is Dropout\(p=0\.1"),
    "dropout of the MLP": (lambda: DiTBlock(drop=0.1), r"mlp\.drop1 is Dropout\(p=0\.1"),
    "dropout in forward": (Dropping, r"draws random numbers from torch \(training\)"),
    "no bias of qkv": (lambda: DiTBlock(qkv_bias=False), r"differ from the published ones in attn\.qkv\.bias"),
    "norms with weights": (lambda: DiTBlock(affine=True), r"in norm1\.bias, norm1\.weight, norm2"),
    "wider heads": (lambda: DiTBlock(attn_head_dim=24), r"attn\.qkv\.weight has the shape \(144, 32\), not \(96, 32\)"),
    "no modulation": (lambda: changed(lambda b: delattr(b, "adaLN_modulation")), r"has no adaLN_modulation$"),
    "LoRA": (
        lambda: changed(lambda b: setattr(b.attn, "qkv", LoRALinear(WIDTH, 3 * WIDTH))),
        r"attn\.qkv is a .*LoRALinear",
    ),
    "parametrization": (
        lambda: changed(lambda b: nn.utils.parametrizations.weight_norm(b.mlp.fc1)),
        r"mlp\.fc1 is a .*ParametrizedLinear",
    ),
    "parameter of its own": (
        lambda: changed(lambda b: setattr(b, "gamma", nn.Parameter(torch.ones(1)))),
        r"differ from the published ones in gamma",
    ),
    "buffer": (lambda: changed(lambda b: b.register_buffer("mask", torch.ones(1))), r"has the buffers mask"),
    "hook inside": (
        lambda: changed(lambda b: b.mlp.fc1.register_forward_hook(lambda *_: None)),
        r"mlp\.fc1 has hooks",
    ),
    "patched forward": (lambda: changed(patch_forward), r"attn has a forward that was patched"),
    "compiled": (lambda: changed(lambda b: b.compile(backend="eager")), r"is compiled; call .* before"),
    "torch.compile around": (lambda: torch.compile(DiTBlock(), backend="eager"), r"is compiled; call .* before"),
    "causal": (
        lambda: changed(lambda b: setattr(b.attn, "__class__", CausalAttention)),
        r"output differs",
    ),
    "other scale": (
        lambda: changed(lambda b: (setattr(b.attn, "fused_attn", False), setattr(b.attn, "scale", 1.0))),
        r"output differs",
    ),
    "stopped gradient": (StopGradient, r"gradient of c differs .* 1\.0e\+00"),
    "returns a tuple": (Sandwich, r"returns a tuple, not a tensor"),
    "third argument": (Rotary, r"takes \(x, c, rope=None\), not \(x, c\)"),
    "heads unknown": (lambda: changed(lambda b: delattr(b.attn, "num_heads")), r"num_heads is None"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_block_that_is_not_the_published_one_is_left(case, caplog):
    make, reason = ODD[case]
    block = make()
    model = Denoiser(DiTBlock(), block)
    with caplog.at_level(logging.INFO):
        replacement = apply_layersync_kernels(model)
    assert list(replacement.replaced) == ["blocks.0"]
    assert model.blocks[1] is block
    ((path, found),) = replacement.left.items()
    assert path.startswith("blocks.1")
    assert re.search(reason, found), found
    (record,) = ours(caplog)
    assert record.levelno == logging.WARNING
    assert path in record.getMessage()
    assert found in str(replacement)


def test_only_unusual_blocks_warn():
    match = r"replaced 0 of 2 blocks .*\n.*blocks\.0, blocks\.1 left: attn\.q_norm.*AdaLNZeroBlock is the fused block"
    with pytest.warns(UserWarning, match=match):
        apply_layersync_kernels(Denoiser(*(DiTBlock(qk_norm=True, norm_layer=nn.LayerNorm) for _ in range(2))))


def test_a_model_without_blocks_warns_alike():
    with pytest.warns(UserWarning, match=r"Sequential has no block of a SiT.*AdaLNZeroBlock is the fused block"):
        replacement = apply_layersync_kernels(nn.Sequential(FinalLayer()))
    assert (replacement.replaced, replacement.left) == ({}, {})


def test_a_second_application_finds_the_blocks_fused(caplog, recwarn):
    model = Denoiser()
    first = apply_layersync_kernels(model)
    blocks = list(model.blocks)
    caplog.clear()  # the first one is recorded too, where another test has started logging
    with caplog.at_level(logging.INFO):
        second = apply_layersync_kernels(model)
    assert second.left == dict.fromkeys(first.replaced, "it is fused already")
    assert list(model.blocks) == blocks
    assert [record.levelno for record in ours(caplog)] == [logging.INFO]
    assert not recwarn.list
    second.undo()
    assert list(model.blocks) == blocks


def test_a_block_alone_has_no_place_to_be_replaced_in():
    with pytest.warns(UserWarning, match="the model left: it is the model itself"):
        apply_layersync_kernels(DiTBlock())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: apply_layersync_kernels([DiTBlock()]), TypeError, "must be an nn.Module, got list"),
        (
            lambda: apply_layersync_kernels(Denoiser(DiTBlock(activation=Erf)), recompute="some"),
            ValueError,
            "unknown recompute='some'",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_blocks_alike_are_tried_once_and_others_apart(monkeypatch):
    tried = []

    def spy(block, ropes):
        tried.append(block)
        return examine(block, ropes)

    examine = replace.examine
    monkeypatch.setattr(replace, "examine", spy)
    odd = DiTBlock()
    odd.attn.fused_attn, odd.attn.scale = False, 1.0
    model = Denoiser(DiTBlock(), DiTBlock(), odd, DiTBlock())
    sizes = [4, 4]
    for block in model.blocks:
        block.sizes = sizes  # not hashable
    assert list(apply_layersync_kernels(model).left) == ["blocks.2"]
    assert len(tried) == 2


# ---- wrappers


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"])
def test_lora_added_to_a_fused_block_has_an_effect(layer):
    eager, inputs = Denoiser(DiTBlock()), batch()
    model = copy.deepcopy(eager)
    apply_layersync_kernels(model)
    for m in (eager, model):
        linear = m.blocks[0].get_submodule(layer)
        m.blocks[0].set_submodule(layer, LoRALinear(linear.in_features, linear.out_features))
        m.blocks[0].get_submodule(layer).load_state_dict(linear.state_dict())
    expected = eager(*inputs)
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_undo_of_a_changed_block_is_refused_and_changes_nothing():
    model = Denoiser()
    replacement = apply_layersync_kernels(model)
    linear = model.blocks[2].mlp.fc1
    model.blocks[2].mlp.fc1 = LoRALinear(WIDTH, 4 * WIDTH)
    with pytest.raises(RuntimeError, match=r"cannot undo, blocks\.2 was"):
        replacement.undo()
    assert len(fused_blocks(model)) == DEPTH
    model.blocks[2].mlp.fc1 = linear
    wrapped, model.blocks[1] = model.blocks[1], nn.Sequential(model.blocks[1])
    with pytest.raises(RuntimeError, match=r"cannot undo, blocks\.1 was"):
        replacement.undo()
    model.blocks[1] = wrapped
    replacement.undo()
    assert not fused_blocks(model)


def test_fused_blocks_compile_into_one_graph_each():
    model, inputs = Denoiser(), batch()
    apply_layersync_kernels(model)
    expected = model(*inputs)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    out = model(*inputs)
    out.sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=1e-4, atol=1e-5)


def test_a_model_compiled_as_a_whole_sees_the_change():
    graphs = []

    def backend(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    model, inputs = Denoiser(), batch()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = compiled(*inputs)
    replacement = apply_layersync_kernels(compiled)
    assert list(replacement.replaced) == [f"_orig_mod.blocks.{i}" for i in range(DEPTH)]
    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2
    assert "layer_norm" in graphs[0]
    assert graphs[1] != graphs[0]
    replacement.undo()
    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_blocks_inside_of_ddp_are_replaced(one_process):
    eager, inputs = Denoiser(), batch()
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(eager))
    replacement = apply_layersync_kernels(model)
    assert list(replacement.replaced) == [f"module.blocks.{i}" for i in range(DEPTH)]
    for m in (eager, model):
        m(*inputs).square().mean().backward()
    assert_same_gradients(model, eager)
    replacement.undo()
    assert not fused_blocks(model)


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_sharded_blocks_are_left_and_fused_ones_can_be_sharded(one_process):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = dist.init_device_mesh("cpu", (1,))
    late, eager, inputs = Denoiser(DiTBlock()), Denoiser(DiTBlock()), batch()
    fully_shard(late.blocks[0], mesh=mesh)
    with pytest.warns(UserWarning, match="attn.qkv.weight is a DTensor; call apply_layersync_kernels before sharding"):
        apply_layersync_kernels(late)
    model = copy.deepcopy(eager)
    replacement = apply_layersync_kernels(model)
    fully_shard(model.blocks[0], mesh=mesh)
    for m in (eager, model):
        m(*inputs).square().mean().backward()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(gradient, q.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="was wrapped, sharded or changed"):
        replacement.undo()
