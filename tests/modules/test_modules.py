"""The blocks of `modules` against the published ones written out in plain PyTorch, with the same parameters."""

import collections
import functools
import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from layersync_kernels import layersync_loss
from layersync_kernels.compiler.recompute import RECOMPUTE
from layersync_kernels.modules import published
from layersync_kernels.modules.attention import Attention, rotary_positions
from layersync_kernels.modules.block import AdaLNZeroBlock, BlockOutput
from layersync_kernels.modules.norm import ModulatedNorm, Stream
from layersync_kernels.modules.published import SiTBlock, modulate
from layersync_kernels.ops import native

from ..support.backends import assert_as_exact_as

WIDTH, HEADS, GRID = 32, 2, 3
KINDS = {
    "sit": {},
    "rms": {"norm": "rms"},
    "qk norm": {"qk_norm": True},
    "swiglu": {"mlp": "swiglu"},
    "rms, qk norm": {"norm": "rms", "qk_norm": True},
    "rms, swiglu": {"norm": "rms", "mlp": "swiglu"},
    "qk norm, swiglu": {"qk_norm": True, "mlp": "swiglu"},
    "lightning": {"norm": "rms", "qk_norm": True, "mlp": "swiglu"},
}


class PlainBlock(nn.Module):
    """DiT's block with LightningDiT's options, op by op: RMSNorm, QK-norm, SwiGLU, RoPE."""

    def __init__(self, norm="layer", qk_norm=False, mlp="gelu"):
        super().__init__()
        norms = {"layer": functools.partial(nn.LayerNorm, elementwise_affine=False), "rms": nn.RMSNorm}
        self.norm1, self.norm2 = (norms[norm](WIDTH, eps=1e-6) for _ in range(2))
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        if qk_norm:
            self.attn.q_norm, self.attn.k_norm = (nn.RMSNorm(WIDTH // HEADS, eps=1e-6) for _ in range(2))
        self.mlp = nn.Module()
        if mlp == "gelu":
            self.mlp.fc1, self.mlp.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        else:
            inner = int(2 / 3 * 4 * WIDTH)
            self.mlp.w12, self.mlp.w3 = nn.Linear(WIDTH, 2 * inner), nn.Linear(inner, WIDTH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.qk_norm, self.kind = qk_norm, mlp

    def attention(self, x, rope):
        q, k, v = self.attn.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        return self.attn.proj((weights @ v).transpose(1, 2).flatten(2))

    def feed_forward(self, x):
        if self.kind == "gelu":
            return self.mlp.fc2(F.gelu(self.mlp.fc1(x), approximate="tanh"))
        a, b = self.mlp.w12(x).chunk(2, dim=-1)
        return self.mlp.w3(F.silu(a) * b)

    def forward(self, x, c, rope=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2.unsqueeze(1) * self.feed_forward(modulate(self.norm2(x), shift2, scale2))


def rotate(x, cos, sin):
    """Neighbouring channels are the parts of a complex number, which is multiplied by cos + i·sin."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos, sin).to(pairs.dtype)[:, ::2]
    return torch.view_as_real(pairs * turn).flatten(-2)


def filled(block):
    """No parameter, not even a norm's weight, is one that could be left out."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block


def blocks(kind, count=1, **options):
    """Fused and plain blocks of equal parameters."""
    fused = [filled(AdaLNZeroBlock(WIDTH, HEADS, **KINDS[kind], **options)) for _ in range(count)]
    plain = [PlainBlock(**KINDS[kind]) for _ in range(count)]
    for f, p in zip(fused, plain, strict=True):
        p.load_state_dict(f.state_dict())
    return fused, plain


def chain(modules, x, c, rope=None):
    """Blocks in a row, each finishing the update of the one before, and the last update."""
    stream = Stream(x)
    for module in modules:
        stream, *_ = module(stream, c, rope, lend_bias=True)
    return stream.finished()


def one_by_one(modules, x, c, rope=None):
    for module in modules:
        x = module(x, c, rope)
    return x


def run(call, modules, inputs, grad, *, dtype=torch.float32, autocast=None, **options):
    """Output, gradients of inputs and of parameters."""
    for module in modules:
        module.to(dtype).zero_grad()
    leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        output = call(modules, *leaves, **options)
    output.backward(grad.to(output))
    names = [f"{i}.{name}" for i, module in enumerate(modules) for name, _ in module.named_parameters()]
    gradients = [p.grad.clone() for module in modules for p in module.parameters()]
    return {"output": output.detach(), "x": leaves[0].grad, "c": leaves[1].grad} | dict(
        zip(names, gradients, strict=True)
    )


def batch(size=2):
    return (torch.randn(size, GRID**2, WIDTH), torch.randn(size, WIDTH)), torch.randn(size, GRID**2, WIDTH)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("call", [one_by_one, chain])
@pytest.mark.parametrize("rope", [False, True], ids=["", "rope"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_those_of_plain_pytorch(kind, rope, call, autocast):
    fused, plain = blocks(kind, 2)
    inputs, grad = batch()
    options = {"rope": rotary_positions((GRID, GRID), WIDTH // HEADS) if rope else None}
    actual = run(call, fused, inputs, grad, autocast=autocast, **options)
    baseline = run(one_by_one, plain, inputs, grad, autocast=autocast, **options)
    truth = run(one_by_one, plain, inputs, grad, dtype=torch.float64, **options)
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        # Products, softmax and two blocks stand between: what is compared is the error of the whole, in the norm. The
        # gradient of a weight is a sum over all tokens whose terms cancel, and 8 ulp of it are luck.
        error, allowed = ((r[name].double() - expected).norm().item() for r in (actual, baseline))
        eps = torch.finfo(autocast or torch.float32).eps
        assert error <= 2 * allowed + 8 * eps * expected.norm().item(), f"{name}: {error:.3g}, PyTorch {allowed:.3g}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_block_is_the_published_one(kind):
    torch.manual_seed(0)
    sit = filled(SiTBlock(WIDTH, HEADS, **KINDS[kind]))
    plain = PlainBlock(**KINDS[kind])
    plain.load_state_dict(sit.state_dict())
    inputs, grad = batch()
    rope = rotary_positions((GRID, GRID), WIDTH // HEADS) if KINDS[kind] else None
    results, expected = (run(one_by_one, [b], inputs, grad, dtype=torch.float64, rope=rope) for b in (plain, sit))
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name])


@pytest.mark.parametrize("kind", ["sit", "lightning"])
def test_a_seed_gives_the_parameters_of_the_published_block(kind):
    torch.manual_seed(0)
    expected = SiTBlock(WIDTH, HEADS, **KINDS[kind]).state_dict()
    torch.manual_seed(0)
    fused = AdaLNZeroBlock(WIDTH, HEADS, **KINDS[kind]).state_dict()
    assert list(fused) == list(expected)
    for name, parameter in fused.items():
        assert torch.equal(parameter, expected[name])


def test_parameters_of_the_lightning_block():
    names = set(AdaLNZeroBlock(WIDTH, HEADS, **KINDS["lightning"]).state_dict())
    linear = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1")
    assert names == {f"{layer}.{kind}" for layer in linear for kind in ("weight", "bias")} | {
        "norm1.weight", "norm2.weight", "attn.q_norm.weight", "attn.k_norm.weight"
    }  # fmt: skip


class Adapted(nn.Linear):
    """As LoRA has it: more than a weight and a bias."""

    def forward(self, x):
        return super().forward(x) + 0.5 * x.mean(-1, keepdim=True)


class Wrapped(nn.Module):
    """In a norm's place."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return 0.5 * self.norm(x)


@pytest.mark.parametrize("rope", [False, True], ids=["", "rope"])
@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "attn.q_norm", "attn.k_norm", "mlp.w12", "mlp.w3"])
def test_what_is_put_in_a_layers_place_has_its_effect(layer, rope):
    (fused,), (plain,) = blocks("lightning")
    for block in (fused, plain):
        old = block.get_submodule(layer)
        if isinstance(old, nn.Linear):
            new = Adapted(old.in_features, old.out_features)
            new.load_state_dict(old.state_dict())
        else:
            new = Wrapped(old)
        block.set_submodule(layer, new)
    inputs, grad = batch()
    options = {"rope": rotary_positions((GRID, GRID), WIDTH // HEADS) if rope else None}
    expected = run(one_by_one, [plain], inputs, grad, **options)
    for name, result in run(one_by_one, [fused], inputs, grad, **options).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def plain_attention(module, x, rope):
    """Of the published block, on the parameters of this one."""
    plain = published.Attention(module.proj.in_features, module.num_heads, qk_norm=module.q_norm is not None)
    plain.load_state_dict(module.state_dict())
    for own, norm in ((plain.q_norm, module.q_norm), (plain.k_norm, module.k_norm)):
        if norm is not None:
            own.eps = norm.eps
    return plain(x, rope)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_heads_wider_than_the_kernels_take(qk_norm):
    module = filled(Attention(2 * 260, 2, qk_norm=qk_norm))
    x, rope = torch.randn(2, 3, 2 * 260), rotary_positions((3,), 260)
    torch.testing.assert_close(module(x, rope), plain_attention(module, x, rope), rtol=1e-4, atol=1e-5)


def test_heads_of_odd_width():
    module, x = filled(Attention(2 * 7, 2, qk_norm=True)), torch.randn(2, 3, 14)
    torch.testing.assert_close(module(x), plain_attention(module, x, None), rtol=1e-4, atol=1e-5)


def test_norms_of_queries_and_keys_have_each_their_eps():
    module, x = filled(Attention(WIDTH, HEADS, qk_norm=True)), torch.randn(2, 3, WIDTH)
    module.q_norm.eps, module.k_norm.eps = 0.5, 2.0
    torch.testing.assert_close(module(x), plain_attention(module, x, None), rtol=1e-4, atol=1e-5)


def test_positions_that_are_learnt_or_each_samples_own():
    module, x = filled(Attention(WIDTH, HEADS, qk_norm=True)), torch.randn(2, 9, WIDTH)
    shared = [part.requires_grad_() for part in rotary_positions((GRID, GRID), WIDTH // HEADS)]
    for rope in (shared, [part.detach().expand(2, 1, -1, -1) for part in shared]):
        torch.testing.assert_close(module(x, rope), plain_attention(module, x, rope), rtol=1e-4, atol=1e-5)
    gradients = (
        torch.autograd.grad(call(x, shared).square().sum(), shared)
        for call in (module, functools.partial(plain_attention, module))
    )
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_positions_and_weights_of_another_dtype():
    """A model in bf16 with its tables, under an autocast of another dtype."""
    module, x = filled(Attention(WIDTH, HEADS, qk_norm=True)).bfloat16(), torch.randn(2, 9, WIDTH)
    rope = tuple(part.bfloat16() for part in rotary_positions((GRID, GRID), WIDTH // HEADS))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            results = module(x.bfloat16(), rope), plain_attention(module, x.bfloat16(), rope)
        torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("recompute", ["light", "full"])
@pytest.mark.parametrize("call", [one_by_one, chain])
@pytest.mark.parametrize("kind", ["sit", "lightning"])
def test_recompute_changes_no_gradient(kind, call, recompute):
    kept, _ = blocks(kind, 2)
    again, _ = blocks(kind, 2, recompute=recompute)
    for k, a in zip(kept, again, strict=True):
        a.load_state_dict(k.state_dict())
    inputs, grad = batch()
    rope = rotary_positions((GRID, GRID), WIDTH // HEADS) if kind == "lightning" else None
    expected = run(call, kept, inputs, grad, rope=rope)
    for name, result in run(call, again, inputs, grad, rope=rope).items():
        assert torch.equal(result, expected[name])


class Counted(TorchDispatchMode):
    """How often each op runs."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().partition("::")[2].partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_light_recomputation_runs_norms_again_but_no_product():
    calls = {}
    for recompute in RECOMPUTE:
        inputs = [tensor.requires_grad_() for tensor in batch()[0]]
        block = AdaLNZeroBlock(WIDTH, HEADS, recompute=recompute)
        block(*inputs).sum().backward()  # what runs once per process is not counted
        with Counted() as counted:
            block(*inputs).sum().backward()
        calls[recompute] = counted.calls["addmm"], counted.calls["mm"], counted.calls["gated_residual_norm_forward"]
    assert calls["light"][:2] == calls["none"][:2]
    assert sum(calls["full"][:2]) > sum(calls["none"][:2])
    assert not native.cpp().loaded or calls["none"][2] < calls["light"][2]


def saved_bytes(module, inputs):
    saved = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.__setitem__(t.data_ptr(), t.untyped_storage().nbytes()) or t, lambda t: t
    )
    with hooks:
        output = module(*inputs)
    del output
    return sum(saved.values())


def test_a_block_keeps_less_for_its_backward_pass_than_plain_pytorch():
    inputs = [tensor.requires_grad_() for tensor in batch(8)[0]]
    block = filled(AdaLNZeroBlock(WIDTH, HEADS))
    plain = PlainBlock()
    assert saved_bytes(block, inputs) < saved_bytes(plain, inputs)


def pair_loss(modules, x, c, rope=None):
    """The entrances of the second and the last block aligned as they pass by."""
    stream = Stream(x)
    stream, *_ = modules[0](stream, c, rope)
    stream, student, _, tap = modules[1](stream, c, rope, tap=True)
    stream, teacher, cosine, _ = modules[2](stream, c, rope, student=tap)
    return stream, student, teacher, cosine


def test_the_sums_for_biases_ride_in_the_seams():
    """Of a bias that its layer lends nobody sums the gradient in a pass of its own."""
    (block,), _ = blocks("sit")
    inputs, _ = batch()
    sums = []

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            if func is torch.ops.aten.sum.dim_IntList and result.numel() == WIDTH:
                sums.append(args[0].numel())
            return result

    output = one_by_one([block], *inputs)
    with Sums():
        output.sum().backward()
    assert sums == ([2 * WIDTH] * 2 if native.cpp() else [2 * GRID**2 * WIDTH] * 2)  # over the samples' sums, or all


def test_a_layer_with_hooks_is_called():
    (block,), _ = blocks("sit")
    inputs, grad = batch()
    expected = run(one_by_one, [block], inputs, grad)
    calls = []
    for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    results = run(one_by_one, [block], inputs, grad)
    assert calls == [block.attn.proj, block.mlp.fc1, block.mlp.fc2]
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "light", "full"])
def test_alignment_rides_along(recompute):
    fused, plain = blocks("sit", 3, recompute=recompute)
    inputs, _ = batch()
    leaves = [tensor.requires_grad_() for tensor in inputs]
    stream, student, teacher, cosine = pair_loss(fused, *leaves)
    loss = -cosine.mean() + (stream.residual + stream.gate.unsqueeze(1) * stream.branch).square().mean()
    loss.backward()
    x = plain[0](*leaves)
    second = plain[1](x, leaves[1])
    expected = layersync_loss(x, second, backend="reference") + plain[2](second, leaves[1]).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student, x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher, second, rtol=1e-4, atol=1e-5)
    expected.backward()
    for f, p in zip(fused, plain, strict=True):
        for (name, a), b in zip(f.named_parameters(), p.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("recompute", ["none", "light"])
@pytest.mark.parametrize("kind", ["sit", "lightning"])
def test_block_compiles_to_one_graph_that_serves_every_batch(kind, recompute):
    torch.compiler.reset()
    (block,), _ = blocks(kind, recompute=recompute)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    rope = rotary_positions((GRID, GRID), WIDTH // HEADS) if kind == "lightning" else None
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (2, 5):
            inputs, grad = batch(size)
            expected = run(one_by_one, [block], inputs, grad, rope=rope)
            for name, result in run(one_by_one, [compiled], inputs, grad, rope=rope).items():
                name = name.replace("_orig_mod.", "")
                torch.testing.assert_close(result, expected[name], rtol=1e-4, atol=1e-5)


def test_stream_of_blocks_compiles_to_one_graph():
    torch.compiler.reset()
    fused, _ = blocks("sit", 3)
    compiled = torch.compile(functools.partial(pair_loss, fused), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (2, 3):
            leaves = [tensor.requires_grad_() for tensor in batch(size)[0]]
            results = [call(*leaves) for call in (compiled, functools.partial(pair_loss, fused))]
            gradients = [
                torch.autograd.grad([cosine.sum(), stream.branch.sum()], leaves) for stream, _, _, cosine in results
            ]
            torch.testing.assert_close(results[0][3], results[1][3])
            for a, e in zip(*gradients, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_a_block_returns_what_it_was_given():
    (block,), _ = blocks("sit")
    (x, c), _ = batch()
    assert isinstance(block(x, c), torch.Tensor)
    output = block(Stream(x), c)
    assert isinstance(output, BlockOutput)
    assert torch.equal(output.hidden, x)
    assert output.cosine is None
    assert output.tap is None


def test_rope_turns_by_differences_of_positions_only():
    cos, sin = rotary_positions((4, 4), 8)
    q, k = torch.randn(2, 1, 8).expand(2, 16, 8).unbind()
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).t()).reshape(4, 4, 4, 4)
    for row, column in itertools.product(range(3), repeat=2):
        torch.testing.assert_close(scores[row, column, row, column], scores[0, 0, 0, 0])
        torch.testing.assert_close(scores[row + 1, column, row, column + 1], scores[1, 0, 0, 1])
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0])


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_modulated_norm(norm):
    module = filled(ModulatedNorm(WIDTH, norm, eps=1e-3))
    (x, shift), _ = batch()
    scale = torch.randn_like(shift)
    weight = None if norm == "layer" else module.weight
    call = F.layer_norm if norm == "layer" else F.rms_norm
    expected = modulate(call(x.double(), (WIDTH,), None if weight is None else weight.double(), eps=1e-3), shift, scale)
    baseline = modulate(call(x, (WIDTH,), weight, eps=1e-3), shift, scale)
    assert_as_exact_as(module(x, shift, scale), baseline, expected)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AdaLNZeroBlock(32, 3), "num_heads=3 does not divide hidden_size=32"),
        (lambda: AdaLNZeroBlock(32, 2, norm="batch"), "unknown norm='batch'; expected 'layer' or 'rms'"),
        (lambda: AdaLNZeroBlock(32, 2, mlp="relu"), "unknown mlp='relu'; expected 'gelu' or 'swiglu'"),
        (
            lambda: AdaLNZeroBlock(32, 2, recompute="some"),
            "unknown recompute='some'; expected one of none, light, full",
        ),
        (lambda: Attention(32, 5), "num_heads=5 does not divide hidden_size=32"),
        (lambda: rotary_positions((4, 4), 6), "head_width=6; expected a multiple of 4"),
    ],
)
def test_bad_arguments_are_explained(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_the_stream_of_the_docs_ends_in_the_tokens_of_the_last_block():
    """docs/blocks.md as it stands."""
    page = (Path(__file__).parents[2] / "docs" / "blocks.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "Stream(" in block)
    torch.manual_seed(0)
    tokens, condition = torch.randn(2, 9, 384), torch.randn(2, 384)
    names = {"tokens": tokens, "condition": condition}
    exec(code, names)
    for block in names["blocks"]:
        tokens = block(tokens, condition)
    torch.testing.assert_close(names["tokens"], tokens)
