"""Blocks with lengths and with words: fused and published kernels alike, nothing of the padding heard or counted."""

import pytest
import torch

from layersync_kernels.compiler.analysis import count_step
from layersync_kernels.modules import AdaLNZeroBlock, Attention, CrossAttention, Stream, rotary_positions
from layersync_kernels.modules.attention import rotate
from layersync_kernels.modules.published import SiTBlock
from layersync_kernels.ops import native

WIDTH, HEADS = 24, 2
MODERN = {"norm": "rms", "qk_norm": True, "mlp": "swiglu"}
LENGTHS = torch.tensor([9, 4, 1])


def filled(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module


def pair(**options):
    """The fused block and the published one with the same weights."""
    fused, published = filled(AdaLNZeroBlock(WIDTH, HEADS, **options)), SiTBlock(WIDTH, HEADS, **options)
    published.load_state_dict(fused.state_dict())
    return fused, published


@pytest.mark.parametrize("options", [{}, MODERN], ids=["sit", "lightning"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("recompute", ["none", "light", "full"])
def test_fused_and_published_blocks_agree(options, cross, rope, recompute):
    blocks = pair(cross=cross, **options)
    for block in blocks:
        block.recompute = recompute
    x, c, text = torch.randn(3, 9, WIDTH), torch.randn(3, WIDTH), torch.randn(3, 5, WIDTH)
    given = {"lengths": LENGTHS, **({"text": text, "text_lengths": torch.tensor([5, 2, 0])} if cross else {})}
    positions = rotary_positions((9,), WIDTH // HEADS) if rope else None
    outputs, gradients = [], []
    for block in blocks:
        leaf = x.clone().requires_grad_()
        out = block(leaf, c, positions, **given)
        outputs.append(out)
        gradients.append(torch.autograd.grad(out.square().sum(), [leaf, *block.parameters()]))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for a, b in zip(*gradients, strict=True):  # of thousands: fp32 rounds by their size, on each machine another way
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 + 1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("cross", [False, True])
def test_a_stream_of_blocks_is_the_blocks_one_by_one(cross):
    first, second = (filled(AdaLNZeroBlock(WIDTH, HEADS, cross=cross)) for _ in range(2))
    x, c = torch.randn(3, 9, WIDTH), torch.randn(3, WIDTH)
    given = {"lengths": LENGTHS, **({"text": torch.randn(3, 5, WIDTH)} if cross else {})}
    stream = second(first(Stream(x), c, **given).stream, c, **given).stream
    together = stream.residual + stream.gate[:, None] * stream.branch
    torch.testing.assert_close(together, second(first(x, c, **given), c, **given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "rope", "norm", "norm and rope"])
def test_attention_does_not_hear_the_padding(kind):
    module = filled(Attention(WIDTH, HEADS, qk_norm="norm" in kind))
    rope = rotary_positions((9,), WIDTH // HEADS) if "rope" in kind else None
    x = torch.randn(3, 9, WIDTH)
    noisy = torch.where(torch.arange(9)[:, None] < LENGTHS[:, None, None], x, 50.0)
    whole, other = (module(own, rope, lengths=LENGTHS) for own in (x, noisy))
    for i, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(whole[i, :length], other[i, :length])
        cut = None if rope is None else tuple(part[:length] for part in rope)
        torch.testing.assert_close(whole[i, :length], module(x[i : i + 1, :length], cut)[0], rtol=1e-4, atol=1e-5)


def test_words_are_heard_as_far_as_they_go():
    module = filled(CrossAttention(WIDTH, HEADS))
    x, text, lengths = torch.randn(3, 9, WIDTH), torch.randn(3, 5, WIDTH), torch.tensor([5, 2, 0])
    heard = module(x, text, text_lengths=lengths)
    other = torch.where(torch.arange(5)[:, None] < lengths[:, None, None], text, -40.0)
    torch.testing.assert_close(module(x, other, text_lengths=lengths), heard)
    torch.testing.assert_close(heard[2], module.proj.bias.expand(9, -1))  # no words
    torch.testing.assert_close(heard[1:2], module(x[1:2], text[1:2, :2]))


def test_cross_attention_begins_with_nothing():
    assert not CrossAttention(WIDTH, HEADS)(torch.randn(2, 3, WIDTH), torch.randn(2, 4, WIDTH)).any()


@pytest.mark.parametrize("extent", [(5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("width", [8, 12])
def test_rotary_positions_turn_by_differences_alone(extent, width):
    cos, sin = rotary_positions(extent, width)
    assert cos.shape == sin.shape == (torch.Size(extent).numel(), width)
    q, k = torch.randn(2, 1, width).expand(2, len(cos), width).unbind()
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).t()).reshape(*extent, *extent)
    inner = tuple(slice(1, None) for _ in extent)
    outer = tuple(slice(None, -1) for _ in extent)
    torch.testing.assert_close(scores[inner + inner], scores[outer + outer])
    for axis in range(len(extent)):  # every dimension is told
        a, b = [0] * len(extent), [0] * len(extent)
        b[axis] = 1
        assert abs(scores[(*a, *b)] - scores[(*a, *a)]) > 1e-4


@pytest.mark.skipif(not native.cpp().loaded, reason="the C++ extension is not there")
def test_the_ledger_counts_the_padding_too():
    """Tensors are counted by their shapes: lengths add their own eight bytes a sample to the attention, and no more."""

    def count(lengths):
        block, x = AdaLNZeroBlock(WIDTH, HEADS), torch.randn(3, 9, WIDTH, requires_grad=True)
        return count_step(lambda: block(x, torch.zeros(3, WIDTH), lengths=lengths).sum())

    without, with_lengths = count(None), count(LENGTHS)
    assert with_lengths.outside == without.outside
    assert with_lengths.inside.read - without.inside.read == 2 * 8 * len(LENGTHS)  # forward and backward
    assert with_lengths.inside.written == without.inside.written
