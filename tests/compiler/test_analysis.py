"""The counter is exact where one can count by hand, and a training step moves and keeps no more than it should."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from layersync_kernels import functional
from layersync_kernels.bench.traffic import Provider, training_step
from layersync_kernels.compiler.analysis import Moved, Op, block_count, count_step, ideal_block
from layersync_kernels.modules import AdaLNZeroBlock, Stream, rotary_positions
from layersync_kernels.modules.published import SiTBlock
from layersync_kernels.ops import native

FLOAT = 4


def ops_of(count, *names):
    """name → what it moved, kinds added up, for some ops or all."""
    moved = {}
    for op, own in count.ops.items():
        name = op.name.removeprefix("aten::")
        if not names or name in names:
            moved[name] = Moved(*map(sum, zip(moved.get(name, Moved()), own, strict=True)))
    return moved


def step_around(function):
    """A step that calls `function` without gradients, and its counts."""
    parameter = torch.zeros((), requires_grad=True)

    def forward():
        with torch.no_grad():
            function()
        return parameter * 1.0

    return count_step(forward)


@functools.cache
def empty_step():
    return step_around(lambda: None)


def count_no_grad(function):
    """Counts of `function` alone."""
    return step_around(function) - empty_step()


def test_a_step_counted_by_hand():
    x = torch.randn(8, 4, requires_grad=True)
    scale = torch.randn(4)

    count = count_step(lambda: (x.view(4, 8).view(8, 4) * scale).sum())

    assert count.ops == {
        Op("rows", "aten::mul"): Moved(
            2, (32 + 4 + 1 + 4) * FLOAT, (32 + 32) * FLOAT
        ),  # the sum's gradient is expanded
        Op("rows", "aten::sum"): Moved(1, 32 * FLOAT, FLOAT),
        Op("layout", "aten::ones_like"): Moved(1, 0, FLOAT),
    }
    assert (count.outside, count.inside) == (Moved(4, 73 * FLOAT, 66 * FLOAT), Moved())
    assert count.outside.total == 139 * FLOAT
    assert (count.saved_bytes, count.weight_bytes) == (0, 0)  # the scale was there before
    assert x.grad is not None


def test_views_and_fresh_memory_move_nothing():
    x = torch.randn(8, 4)

    def function():
        x.t().reshape(2, 2, 8).permute(2, 0, 1)[1:].detach().unbind(0)
        x.unsqueeze(0).expand(5, -1, -1).flatten(1)
        torch.ops.aten._unsafe_view(x, [32])  # a view whose schema does not say so
        torch.empty(3), torch.empty_like(x), x.new_empty(2), torch.zeros(0), x[:0] + 1

    assert count_no_grad(function).ops == {}


@pytest.mark.parametrize(
    ("function", "read", "written"),
    [
        (lambda x: x * x, 32, 32),
        (lambda x: x[:, :2] * x[:, 2:], 32, 16),
        (lambda x: x[:1].expand(8, 4) + x, 36, 32),
        (lambda x: x[:1].expand(8, 4).contiguous(), 4, 32),
        (lambda x: x[:, ::2].expand(5, 8, 2) + 1, 16, 80),
        (lambda x: x.as_strided((7, 8), (4, 1)).clone(), 32, 56),
        (lambda x: torch.zeros_like(x), 0, 32),
        (lambda x: x.new_zeros(3), 0, 3),
        (lambda x: torch.ones(5), 0, 5),
        (lambda x: x.add_(1), 32, 32),
        (lambda x: x[0].add_(x[1]), 8, 4),
        (lambda x: x.zero_(), 0, 32),
        (lambda x: torch.empty_like(x).copy_(x[:1]), 4, 32),
        (lambda x: torch.add(x, 1, out=x[:0].new_empty(8, 4)), 32, 32),
        (lambda x: torch.cat([x, x[:2]]), 40, 40),
        (lambda x: x.split([2, 6]), 0, 0),
        (lambda x: torch._foreach_mul([x, x[0]], 2.0), 36, 36),
        (lambda x: x.to(torch.bfloat16), 32, 16),
        (lambda x: F.embedding(torch.tensor([1, 1, 5]), x), 12 + 6, 12),  # 3 int64 indices
        (lambda x: F.layer_norm(x, (4,)), 32, 32 + 16),
        (lambda x: x.sum().item(), 32, 1),
    ],
)
def test_an_op_moves_the_distinct_elements_of_its_inputs_and_its_outputs(function, read, written):
    moved = count_no_grad(functools.partial(function, torch.randn(8, 4))).outside
    assert (moved.read, moved.written) == (read * FLOAT, written * FLOAT)


def test_matrix_products_and_attention_are_counted_apart():
    weight, q = torch.randn(4, 6, requires_grad=True), torch.randn(1, 1, 8, 4)
    count = count_step(lambda: F.scaled_dot_product_attention(q @ weight[:, :4], q, q).sum())
    assert count.kind("products").kernels == 2
    assert count.kind("attention").kernels == 2
    assert count.inside.kernels == 4
    outside = {op.name for op in count.ops if op.kind not in ("products", "attention")}
    assert not any("mm" in name or "attention" in name for name in outside)


def gradients_of(function, *shapes):
    """Counts of a step through `function` of leaves, without what reduces its result."""
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return count_step(lambda: function(*leaves).sum())


@pytest.mark.skipif(not native.cpp().loaded, reason="no C++ kernels for this machine")
def test_the_products_of_a_fused_loss_are_counted_as_such():
    """One chunk or strip is all that there is: eager takes the three products of a linear layer, or as many of Gram."""
    rows, width, projected = 32, 8, 4
    teacher = torch.randn(rows, projected)
    projected_loss = gradients_of(
        lambda hidden, weight: functional.projected_alignment_loss(hidden, weight, None, teacher, backend="cpp"),
        (rows, width), (projected, width),
    )  # fmt: skip
    products = projected_loss.kind("products")
    sides = rows * width, projected * width, rows * projected
    assert products.kernels == 3
    assert products.total == (3 * sum(sides) + projected * width) * FLOAT  # the sum over chunks is one more operand
    assert projected_loss.kind("alignment").kernels == 1
    assert not any("projected_alignment" in op.name for op in projected_loss.ops)

    gram = gradients_of(
        lambda student: functional.gram_alignment_loss(student, teacher[None, :16], backend="cpp"), (1, 16, width)
    )
    assert gram.kind("products").kernels == 2  # the differences, and the gradient
    assert gram.kind("alignment").kernels == 1

    dispersive = gradients_of(functional.dispersive_loss, (rows, width))
    assert dispersive.kind("products") == Moved(
        2, (2 * sides[0] + rows * rows + rows * rows + sides[0]) * FLOAT, (rows * rows + sides[0]) * FLOAT
    )


def test_what_is_kept_for_the_backward_pass():
    x = torch.randn(16, 8, requires_grad=True)
    y = torch.randn(16, 8)

    def forward():
        a = x.exp()  # kept by exp, and by sin
        b = a.sin()  # kept by the product
        return (b * y + x).sum()

    assert count_step(forward).saved_bytes == 16 * 8 * FLOAT  # y is no part of it, and b is not needed: y is constant
    assert count_step(lambda: (x.exp().sin() * x).sum()).saved_bytes == 2 * 16 * 8 * FLOAT
    assert count_step(lambda: (x * x).sum()).saved_bytes == 0


def test_a_checkpoint_keeps_its_input_alone_and_its_second_forward_is_counted():
    x = torch.randn(16, 8, requires_grad=True)

    def function(h):
        return h.sin().exp().sin()

    plain = count_step(lambda: function(x * 2).sum())
    kept = count_step(lambda: checkpoint(function, x * 2, use_reentrant=False).sum())
    assert plain.saved_bytes == 2 * 16 * 8 * FLOAT  # of three: one is the input, and exp and the second sin share one
    assert kept.saved_bytes == 16 * 8 * FLOAT
    assert ops_of(plain, "sin", "exp") == {"sin": Moved(2, 1024, 1024), "exp": Moved(1, 512, 512)}
    assert ops_of(kept, "sin", "exp") == {"sin": Moved(3, 1536, 1536), "exp": Moved(2, 1024, 1024)}  # it stops early


def test_copies_of_parameters_are_kept_and_moved_on_their_own_account():
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(16, 8)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x).float().sum()

    count = count_step(forward)
    assert count.weight_bytes == 0  # x is constant: its gradient does not need the weight
    assert count.saved_bytes == 16 * 8 * 2
    assert count.kind("weights") == Moved(2, 32 * (4 + 2), 32 * (2 + 4))  # the cast, and that of its gradient
    assert count.kind("casts") == Moved(3, 128 * 4 + 64 * 2 + 1 * 4, 128 * 2 + 64 * 4 + 64 * 2)
    x.requires_grad_()
    assert count_step(forward).weight_bytes == 32 * 2


def test_gradients_that_add_up_are_counted():
    x = torch.randn(16, 8, requires_grad=True)
    first, second = (count_step(lambda: (x * 2).sum()) for _ in range(2))
    assert (second - first).outside == Moved(1, 2 * 128 * FLOAT, 128 * FLOAT)


def test_a_loss_that_cannot_be_differentiated_is_refused():
    for bad in (lambda: torch.zeros(()), lambda: torch.zeros(2, requires_grad=True), lambda: 0.0):
        with pytest.raises(ValueError, match="must return the loss"):
            count_step(bad)


# The model: SiT-P/2 (D = 128) on 8x8 tokens.
BATCH, TOKENS, WIDTH = 4, 64, 128
ELEMENTS = BATCH * TOKENS * WIDTH
MD = FLOAT * ELEMENTS
needs_kernels = pytest.mark.skipif(
    not native.cpp().loaded or native.cpp().facts.cpu_isa() == "generic",
    reason="no C++ kernels for this machine",
)


@functools.cache
def step(provider, precision="fp32", depth=3):
    autocast = torch.bfloat16 if precision == "bf16" else None
    return count_step(training_step(provider, "SiT-P/2", BATCH, autocast, depth, input_size=16))


@functools.cache
def block(provider, precision="fp32"):
    return step(provider, precision, 3) - step(provider, precision, 2)


EAGER, FUSED, LIGHT, FULL = Provider("eager"), Provider("fused"), Provider("fused", "light"), Provider("fused", "full")


def test_a_block_is_the_difference_of_two_depths():
    make = functools.partial(training_step, EAGER, "SiT-P/2", BATCH, None, input_size=16)
    assert block_count(make) == block(EAGER)
    assert step(EAGER, depth=4) - step(EAGER, depth=3) == block(EAGER)


def test_an_eager_block_moves_ninety_tensors_and_twelve_around_attention():
    moved = block(EAGER)
    assert moved.kind("gelu").total == 20 * MD
    row = FLOAT * BATCH * WIDTH
    sums = FLOAT * 11 * WIDTH + FLOAT * 4 * WIDTH + 6 * row + FLOAT * 6 * WIDTH  # of qkv, proj, fc2, fc1, adaLN
    assert moved.kind("bias").total <= 9 * MD + sums
    assert 60 * MD <= moved.kind("rows").total <= 61 * MD
    assert moved.kind("layout").total == 12 * MD + 12 * row


@needs_kernels
def test_a_fused_block_moves_what_its_kernels_must_to_the_byte():
    moved, row = block(FUSED), FLOAT * BATCH * WIDTH
    # A boundary forward: x and branch, gate, shift and scale → residual, norm, two statistics of each row. Backward:
    # two gradients, residual and branch, gate, scale, statistics → two gradients, and those of gate, shift, scale and
    # of the bias, sample by sample.
    statistics = 2 * FLOAT * BATCH * TOKENS
    read = 2 * MD + 3 * row + 4 * MD + 2 * row + statistics
    written = 2 * MD + statistics + 2 * MD + 4 * row
    # Then SiLU of the condition, its backward, and one more gradient of the condition to add up.
    assert moved.kind("rows") == Moved(4 + 3, 2 * read + 5 * row, 2 * written + 3 * row)
    assert moved.kind("gelu").total == 24 * MD + FLOAT * 4 * WIDTH  # 4 MD write the activation again: it is not kept
    # Of proj and fc2 over the samples, and of adaLN; those of qkv and fc1 come summed.
    assert moved.kind("bias").total == 8 * row + FLOAT * 8 * WIDTH
    assert moved.kind("layout").total == 12 * row  # the six parts of the modulation's gradient
    assert moved.kind("casts", "weights") == Moved()
    assert moved.outside.kernels == 13
    assert step(FUSED).inside.kernels == step(EAGER).inside.kernels


@needs_kernels
def test_traffic_stays_within_its_limits():
    assert block(FUSED).kind("rows").total <= 21 * MD
    assert block(FUSED).outside.total <= 45 * MD
    assert block(FUSED).outside.total >= ideal_block(ELEMENTS).outside.total == 40 * MD
    half = block(FUSED, "bf16")
    ideal = ideal_block(ELEMENTS, branch=torch.bfloat16)
    assert ideal.kind("rows").total <= half.kind("rows").total <= 21 / 20 * ideal.kind("rows").total
    # But for three biases, which their layers are given detached, and whose gradients come in fp32.
    biases = 3 * 2 * (FLOAT + 2) * 3 * WIDTH
    assert 0 <= block(EAGER, "bf16").kind("weights").total - half.kind("weights").total <= biases
    assert half.outside.total - half.kind("weights").total <= 45 / 40 * ideal.outside.total


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layersync_adds_one_read_of_each_hidden_state(precision):
    added = step(Provider("fused", aligned=True), precision) - step(FUSED, precision)
    floats_per_token = 42
    assert 2 * MD <= added.outside.total <= 2 * MD + floats_per_token * FLOAT * BATCH * TOKENS
    assert added.outside.kernels <= 24
    assert added.inside == Moved()
    assert added.saved_bytes <= 4 * FLOAT * BATCH * TOKENS


@needs_kernels
@pytest.mark.parametrize(
    ("provider", "precision", "limit"),
    [(FUSED, "fp32", 0.92), (FUSED, "bf16", 0.70), (LIGHT, "fp32", 0.60), (LIGHT, "bf16", 0.60), (FULL, "bf16", 0.20)],
)
def test_saved_bytes_stay_within_their_limits(provider, precision, limit):
    assert block(provider, precision).saved_bytes <= limit * block(EAGER, precision).saved_bytes


@needs_kernels
def test_a_fused_block_saves_fourteen_tensors_and_a_few_floats_a_row():
    modulation = FLOAT * 7 * BATCH * WIDTH  # with SiLU of the condition
    statistics = 2 * 2 * FLOAT * BATCH * TOKENS
    assert block(FUSED).saved_bytes == ideal_block(ELEMENTS).saved_bytes + modulation + statistics


# LightningDiT's block on the same tokens: RMSNorm, norms of queries and keys, rotary positions, SwiGLU.
HEADS, INNER = 2, int(2 / 3 * 4 * WIDTH)


def modern_step(kind, recompute, autocast, depth):
    """The forward pass of a stream of blocks, up to a loss."""
    torch.manual_seed(0)
    options = {"norm": "rms", "qk_norm": True, "mlp": "swiglu", "recompute": recompute}
    blocks = [kind(WIDTH, HEADS, **options) for _ in range(depth)]
    x, c = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True), torch.randn(BATCH, WIDTH, requires_grad=True)
    rope = rotary_positions((8, 8), WIDTH // HEADS)

    def forward():
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            if kind is SiTBlock:
                out = x
                for block in blocks:
                    out = block(out, c, rope)
            else:
                stream = Stream(x)
                for block in blocks:
                    stream = block(stream, c, rope, lend_bias=True).stream
                out = stream.finished()
            return out.float().square().mean()

    return forward


@functools.cache
def modern(kind, precision="fp32", recompute="none"):
    autocast = torch.bfloat16 if precision == "bf16" else None
    return block_count(functools.partial(modern_step, kind, recompute, autocast))


@needs_kernels
def test_a_modern_block_moves_what_its_kernels_must_to_the_byte():
    moved = ops_of(modern(AdaLNZeroBlock))
    width = WIDTH // HEADS
    tables, weights, inner = 2 * FLOAT * TOKENS * width, 2 * FLOAT * width, FLOAT * BATCH * TOKENS * INNER
    assert moved["layersync_cpp::qk_norm_rope_forward"] == Moved(1, 3 * MD + tables + weights, 2 * MD)
    assert moved["layersync_cpp::qk_norm_rope_backward"] == Moved(
        1,
        6 * MD + tables + weights,
        3 * MD + weights + 3 * FLOAT * WIDTH,  # with the sum for the bias of qkv
    )
    assert moved["layersync_cpp::swiglu_forward"] == Moved(1, 2 * inner, inner)
    assert moved["layersync_cpp::swiglu_backward"] == Moved(1, 3 * inner, 3 * inner + 2 * FLOAT * INNER)
    assert moved["layersync_cpp::gated_residual_norm_forward"].kernels == 2
    others = modern(AdaLNZeroBlock).outside.total - sum(
        own.total for name, own in moved.items() if name.startswith("layersync_cpp::")
    )
    assert others <= 0.2 * MD  # what is as small as the condition


@needs_kernels
@pytest.mark.parametrize(
    ("precision", "recompute", "moved", "kept"),
    [("fp32", "none", 0.22, 0.61), ("fp32", "light", 0.30, 0.44), ("bf16", "none", 0.14, 0.51),
     ("bf16", "light", 0.19, 0.35)],
)  # fmt: skip
def test_what_a_modern_block_moves_and_keeps_of_the_eager_one(precision, recompute, moved, kept):
    fused, eager = modern(AdaLNZeroBlock, precision, recompute), modern(SiTBlock, precision)

    def activations(count):
        return count.outside.total - count.kind("weights").total

    assert activations(fused) <= moved * activations(eager)
    assert fused.saved_bytes <= kept * eager.saved_bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_saved_bytes_agree_with_what_autograd_packs(kernels, precision):
    autocast = torch.bfloat16 if precision == "bf16" else None
    forward = training_step(Provider(kernels), "SiT-P/2", BATCH, autocast, 2, input_size=16)
    packed = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter) and not (tensor._is_view() and isinstance(tensor._base, nn.Parameter)):
            storage = tensor.untyped_storage()
            packed[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    count = count_step(forward)
    assert loss.requires_grad
    assert count.saved_bytes + count.weight_bytes == sum(storage.nbytes() for storage in packed.values())
