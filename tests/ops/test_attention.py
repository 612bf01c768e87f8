"""Packed self-attention: the C++ kernels against torch's scaled_dot_product_attention in fp64 and in the same dtype."""

import functools
import subprocess
import sys
import types

import pytest
import torch

from layersync_kernels.functional import attention, qk_norm_rope, self_attention
from layersync_kernels.ops import dispatch, native
from layersync_kernels.ops.attention import op, self_attention_reference

from ..support.backends import LOWER_INSTRUCTION_SETS, assert_as_exact_as, run_on_lower_instruction_set

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

needs_cpp = pytest.mark.skipif(not native.cpp().loaded, reason=f"the C++ extension is {native.cpp().reason}")


def run(qkv, heads, backend, grad, lengths=None, call=self_attention):
    """Output and gradient of one call, on a fresh leaf that keeps the strides."""
    leaf = qkv.detach().requires_grad_()
    out = call(leaf, heads, backend, lengths=lengths)
    return out.detach(), *torch.autograd.grad(out, leaf, grad)


def attention_of_three(qkv, heads, backend, *, lengths=None):
    """`attention` as `self_attention` is called."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attention(q, k, v, lengths=lengths, backend=backend)


def check(qkv, heads, grad, lengths=None):
    actual = run(qkv, heads, "cpp", grad, lengths)
    for result, of_three in zip(actual, run(qkv, heads, "cpp", grad, lengths, attention_of_three), strict=True):
        torch.testing.assert_close(of_three, result, rtol=0, atol=0, equal_nan=True)
    baseline = run(qkv, heads, "reference", grad, lengths)
    truth = run(qkv.double(), heads, "reference", grad.double(), lengths)
    assert actual[0].dtype == actual[1].dtype == qkv.dtype
    assert actual[0].is_contiguous()
    assert actual[1].is_contiguous()
    assert_as_exact_as(actual[0], baseline[0], truth[0])
    # q, k and v have gradients of different magnitudes, k's and q's of differences of dP: sums over E of v·d_out.
    *_, v = qkv.double().chunk(3, -1)
    terms = (v.abs().amax() * grad.double().abs().amax() * qkv.double().abs().amax()).item() if v.numel() else 0.0
    for a, b, t in zip(*(x[1].chunk(3, -1) for x in (actual, baseline, truth)), strict=True):
        assert_as_exact_as(a, b, t, terms=terms)


@needs_cpp
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"),
    [
        (2, 1, 2, 8),  # one token: P = 1
        (2, 2, 1, 1),
        (1, 5, 3, 7),  # odd tokens and channels: the last of a pair is alone
        (2, 24, 2, 16),
        (1, 25, 1, 33),
        (2, 64, 2, 64),  # whole panels
        (1, 67, 2, 72),  # a panel and a bit
        (1, 300, 1, 80),  # sums of several parts
        (1, 130, 1, 130),
    ],
)
def test_cpp_values_and_gradients(dtype, batch, tokens, heads, width, poisoned_memory):
    qkv = torch.randn(batch, tokens, 3 * heads * width).to(dtype)
    check(qkv, heads, torch.randn(batch, tokens, heads * width).to(dtype))


@needs_cpp
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("tokens", "lengths"), [(9, (9, 0, 1, 5)), (70, (64, 65, 3, 70)), (130, (24, 25, 129, 100)), (1, (1, 0, 1, 0))]
)
def test_cpp_values_of_lengths(dtype, tokens, lengths, poisoned_memory):
    qkv = torch.randn(4, tokens, 3 * 2 * 10).to(dtype)
    check(qkv, 2, torch.randn(4, tokens, 20).to(dtype), torch.tensor(lengths))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lengths", [None, (40, 0, 7)])
@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), "reference"])
@pytest.mark.parametrize("of", [torch.float32, None])
def test_a_bias_gets_the_gradient_of_qkv_summed(backend, lengths, dtype, of, poisoned_memory):
    """Before it is rounded, or of what is written."""
    qkv, grad = torch.randn(3, 40, 3 * 2 * 11).to(dtype), torch.randn(3, 40, 22).to(dtype)
    lengths = None if lengths is None else torch.tensor(lengths)

    def sums(qkv, grad, backend, bias):
        leaves = qkv.detach().requires_grad_(), bias.requires_grad_()
        out = self_attention(leaves[0], 2, backend, lengths=lengths, bias=leaves[1])
        assert torch.equal(out, self_attention(leaves[0], 2, backend, lengths=lengths))
        return torch.autograd.grad(out, leaves, grad)

    bias = torch.randn(66).to(of or dtype)
    d_qkv, d_bias = sums(qkv, grad, backend, bias)
    assert torch.equal(d_qkv, run(qkv, 2, backend, grad, lengths)[1])
    assert d_bias.dtype == bias.dtype
    _, exact = sums(qkv.double(), grad.double(), "reference", bias.double())
    rounding = torch.finfo(dtype).eps * d_qkv.double().abs().sum((0, 1)) + torch.finfo(bias.dtype).eps * exact.abs()
    assert (d_bias.double() - exact).abs().le(2 * rounding + 4e-5).all()


@needs_cpp
@pytest.mark.parametrize("norm", [True, False])
def test_cpp_attention_reads_what_qk_norm_rope_writes(norm):
    """No copy of queries, keys, values or gradients between the two."""
    qkv = torch.randn(2, 6, 24, requires_grad=True)
    weights = [torch.randn(4)] * 2 if norm else [None] * 2
    tables = [torch.randn(6, 4)] * 2
    grad = torch.randn(2, 6, 8)
    with torch.profiler.profile() as profiler:
        out = attention(*qk_norm_rope(qkv, *weights, *tables, 2, backend="cpp"), backend="cpp")
        (actual,) = torch.autograd.grad(out, qkv, grad)
    assert not {event.name for event in profiler.events()} & {"aten::copy_", "aten::clone", "aten::contiguous"}
    leaf = qkv.detach().double().requires_grad_()
    wide = [None if t is None else t.double() for t in (*weights, *tables)]
    out = attention(*qk_norm_rope(leaf, *wide, 2, backend="reference"), backend="reference")
    torch.testing.assert_close(actual.double(), torch.autograd.grad(out, leaf, grad.double())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), "reference"])
def test_lengths_cut_samples_off(backend, dtype):
    """What lies beyond is as if it were not there: it changes nothing, and gets zeros, and a gradient of zeros."""
    qkv, grad = torch.randn(3, 12, 3 * 2 * 8).to(dtype), torch.randn(3, 12, 16).to(dtype)
    lengths = torch.tensor([12, 7, 0])
    for sample, length in enumerate(lengths.tolist()):
        qkv[sample, length:] = float("nan") if backend == "cpp" else 30.0
    for result, width in zip(run(qkv, 2, backend, grad, lengths), (16, 48), strict=True):
        assert result.shape[-1] == width
        for sample, length in enumerate(lengths.tolist()):
            assert not result[sample, length:].any()
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for sample, length in enumerate(lengths.tolist()[:2]):
        cut = run(qkv[sample : sample + 1, :length], 2, backend, grad[sample : sample + 1, :length])
        for whole, alone in zip(run(qkv, 2, backend, grad, lengths), cut, strict=True):
            torch.testing.assert_close(whole[sample : sample + 1, :length], alone, **tolerance)


@pytest.mark.parametrize(
    ("lengths", "error", "match"),
    [
        (torch.tensor([3.0, 1.0]), TypeError, "lengths must be int64"),
        (torch.tensor([3]), ValueError, r"lengths are \(1,\).*expected \(2,\)"),
        (torch.tensor([[3, 1]]), ValueError, r"expected \(2,\)"),
    ],
)
def test_lengths_that_do_not_fit_are_explained(lengths, error, match):
    with pytest.raises(error, match=match):
        self_attention(torch.randn(2, 5, 24), 2, lengths=lengths)


@needs_cpp
@pytest.mark.parametrize("length", [-1, 6])
def test_cpp_refuses_lengths_out_of_range(length):
    with pytest.raises(RuntimeError, match=rf"lengths\[1\] is {length}; expected 0 to 5"):
        self_attention(torch.randn(2, 5, 24), 2, "cpp", lengths=torch.tensor([5, length]))


@needs_cpp
@pytest.mark.parametrize("dtype", FLOATS)
def test_cpp_sharp_and_shifted_scores(dtype):
    """Scores of ±50 must not be rounded to the dtype, nor a shift of all values drown the gradient of scores."""
    qkv = torch.randn(1, 60, 3 * 2 * 32)
    qkv[..., :128] *= 4
    check(qkv.to(dtype), 2, torch.randn(1, 60, 64).to(dtype))
    qkv = torch.randn(1, 60, 3 * 2 * 32)
    qkv[..., 128:] += 6
    check(qkv.to(dtype), 2, torch.randn(1, 60, 64).to(dtype))


@needs_cpp
def test_cpp_long_sums_do_not_gather_errors():
    qkv = torch.randn(1, 4096, 3 * 16)
    qkv[..., 32:] += 8  # all of one sign
    check(qkv, 1, torch.randn(1, 4096, 16))


@needs_cpp
def test_cpp_scores_beyond_the_range_of_exp():
    """Row maxima are subtracted: scores of ±1e4 neither overflow nor divide by zero."""
    qkv = torch.randn(1, 9, 3 * 8)
    qkv[..., :16] *= 100
    for result in run(qkv, 1, "cpp", torch.randn(1, 9, 8)):
        assert result.isfinite().all()
    torch.testing.assert_close(self_attention(qkv, 1, "cpp"), self_attention_reference(qkv, 1))


STRIDED = {
    "slice of wider channels": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "batch second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "without the class token": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one sample for all": lambda x: x[:1].expand_as(x),
    "one token for all": lambda x: x[:, :1].expand_as(x),
    "one value for all": lambda x: x[:1, :1, :1].expand_as(x),
}


@needs_cpp
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("view", STRIDED)
def test_cpp_inputs_and_gradients_of_any_stride(view, dtype, poisoned_memory):
    qkv, grad = torch.randn(3, 7, 3 * 2 * 10).to(dtype), torch.randn(3, 7, 20).to(dtype)
    for a, g in ((STRIDED[view](qkv), grad), (qkv, STRIDED[view](grad))):
        actual, expected = run(a, 2, "cpp", g), run(a.contiguous(), 2, "cpp", g.contiguous())
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y)


@needs_cpp
@pytest.mark.parametrize("shape", [(0, 4, 24), (2, 0, 24), (2, 4, 0), (0, 0, 0)])
def test_cpp_nothing_in_nothing_out(shape):
    out, gradient = run(torch.randn(shape), 2, "cpp", torch.randn(*shape[:2], shape[2] // 3))
    assert out.shape == (*shape[:2], shape[2] // 3)
    assert gradient.shape == shape


@needs_cpp
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_cpp_nan_reaches_what_the_reference_says(part, dtype):
    """A NaN in q poisons its row, one in k all rows of its head, one in v a channel of all rows; nothing elsewhere."""
    qkv, grad = torch.randn(2, 20, 3 * 2 * 8).to(dtype), torch.randn(2, 20, 16).to(dtype)
    qkv[1, 3, 16 * "qkv".index(part) + 2] = float("nan")
    actual, expected = run(qkv, 2, "cpp", grad), run(qkv.float(), 2, "reference", grad.float())
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.isnan(), e.isnan())


@pytest.mark.threads
@needs_cpp
def test_cpp_results_do_not_depend_on_threads_or_batch():
    qkv, grad = torch.randn(3, 50, 3 * 4 * 24).bfloat16(), torch.randn(3, 50, 96).bfloat16()
    first = run(qkv, 4, "cpp", grad)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for a, e in zip(run(qkv, 4, "cpp", grad), first, strict=True):
                assert torch.equal(a, e)
    finally:
        torch.set_num_threads(threads)
    for a, e in zip(run(qkv[1:2], 4, "cpp", grad[1:2]), first, strict=True):
        assert torch.equal(a, e[1:2])


CALLS = {
    "self_attention": lambda x, backend: self_attention(torch.cat([x, 2 * x, x.square()], dim=-1), 2, backend),
    "attention": lambda x, backend: attention(
        *(t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (x, 2 * x, x.square())), backend=backend
    ),
}


def raw_samples(backend):
    """Arguments of every raw op, for test_registry.py."""
    parts, grad = torch.randn(2, 5, 24).chunk(3, -1), torch.randn(2, 5, 8)
    yield "attention_forward", (*parts, None, 2)
    yield "attention_forward", (*parts, torch.tensor([5, 2]), 2)
    for bias in (False, True):
        yield "attention_backward", (grad, *parts, torch.tensor([5, 2]), 2, bias)


@needs_cpp
def test_cpp_raw_ops_refuse_inputs_that_the_edge_would_have_caught():
    x = torch.randn(2, 5, 8)
    one, short = torch.tensor([5]), torch.tensor([5, 2], dtype=torch.int32)
    for args in (
        (x, x, x, None, 3),
        (x, x, x, None, 0),
        (x[0], x[0], x[0], None, 2),
        (x.double(), x.double(), x.double(), None, 2),
        (x, x[:1], x, None, 2),
        (x, x, x.bfloat16(), None, 2),
        (x, x, x, one, 2),
        (x, x, x, short, 2),
    ):
        with pytest.raises(RuntimeError, match="layersync_kernels"):
            op.FORWARD["cpp"](*args)
    for bad in (x[:1], x[..., :4], x.bfloat16(), x[0]):
        with pytest.raises(RuntimeError, match="layersync_kernels"):
            op.BACKWARD["cpp"](bad, x, x, x, None, 2, False)


@needs_cpp
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("backend", ["cpp", "auto"])
def test_fullgraph_compile_equals_eager_and_does_not_recompile(backend, with_lengths):
    torch._dynamo.reset()

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=True)
    def step(qkv, lengths):
        return self_attention(2 * qkv, 2, backend, lengths=lengths)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 3), (4, 5), (6, 700)):
            qkv = torch.randn(batch, tokens, 24, requires_grad=True)
            grad = torch.randn(batch, tokens, 8)
            lengths = torch.randint(1, tokens, (batch,)) if with_lengths else None
            compiled, eager = step(qkv, lengths), self_attention(2 * qkv, 2, backend, lengths=lengths)
            assert torch.equal(compiled, eager)
            a, e = (torch.autograd.grad(out, qkv, grad)[0] for out in (compiled, eager))
            assert torch.equal(a, e)


@needs_cpp
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_cpp_checkpointing(use_reentrant):
    qkv = torch.randn(2, 6, 24, requires_grad=True)
    block = functools.partial(self_attention, num_heads=2, backend="cpp")
    (expected,) = torch.autograd.grad(block(qkv).sum(), qkv)
    torch.utils.checkpoint.checkpoint(block, qkv, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(qkv.grad, expected)


@needs_cpp
def test_cpp_functional_gradient():
    qkv = torch.randn(2, 6, 24)
    gradient = torch.func.grad(lambda x: self_attention(x, 2, "cpp").square().sum())(qkv)
    expected = torch.func.grad(lambda x: self_attention(x, 2, "reference").square().sum())(qkv)
    torch.testing.assert_close(gradient, expected)


@needs_cpp
def test_cpp_second_derivatives_are_an_error():
    qkv = torch.randn(2, 6, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(self_attention(qkv, 2, "cpp").square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@needs_cpp
def test_cpp_saves_its_inputs_alone():
    qkv = torch.randn(2, 6, 24, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        self_attention(qkv, 2, "cpp")
    assert saved == [qkv.data_ptr()]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        self_attention(qkv, 2, "cpp", lengths=(lengths := torch.tensor([6, 3])))
    assert saved[1:] == [qkv.data_ptr(), lengths.data_ptr()]


@pytest.mark.threads
@needs_cpp
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_cpp_memory_grows_with_tokens_not_with_their_square():
    """Scores of 2 heads of 6,000 tokens would take 288 MB."""
    program = """
import torch
from layersync_kernels.functional import self_attention
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
torch.set_num_threads(2)
self_attention(torch.randn(1, 8, 48, requires_grad=True), 2, "cpp").sum().backward()
qkv = torch.randn(1, 6000, 48, requires_grad=True)
before = peak()
self_attention(qkv, 2, "cpp").sum().backward()
print(peak() - before)
"""
    report = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(report.stdout) < 48


@needs_cpp
@pytest.mark.parametrize("isa", LOWER_INSTRUCTION_SETS)
def test_lower_instruction_sets_pass_the_same_tests(isa):
    numbers = "cpp_values or cpp_sharp or cpp_scores or cpp_inputs or cpp_nothing or cpp_nan"
    run_on_lower_instruction_set(isa, __file__, numbers)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_the_reference_is_attention(dtype):
    qkv = torch.randn(2, 5, 3 * 2 * 4).to(dtype)
    q, k, v = qkv.double().view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
    actual = self_attention(qkv, 2, "reference")
    assert actual.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected.transpose(1, 2).reshape(2, 5, 8), rtol=0, atol=tolerance)


def test_auto_takes_the_reference_where_the_kernels_cannot_run():
    qkv = torch.randn(2, 5, 24, dtype=torch.float64)
    assert dispatch.resolve("self_attention", "auto", "cpu", torch.float64) == "reference"
    assert torch.equal(self_attention(qkv, 2), self_attention_reference(qkv, 2))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_without_kernels_is_refused(backend):
    """TRITON_INTERPRET makes Triton itself possible here."""
    with pytest.raises(RuntimeError, match=f"self_attention: backend='{backend}' cannot run: attention has no"):
        self_attention(torch.randn(2, 5, 24), 2, backend)


@needs_cpp
@pytest.mark.parametrize(("isa", "expected"), [("generic", "reference"), ("avx2", "cpp")])
def test_auto_passes_over_kernels_that_are_slower(isa, expected, monkeypatch):
    facts = types.SimpleNamespace(cpu_isa=lambda: isa)
    monkeypatch.setattr(native, "cpp", lambda: native.Library(True, "pretended", facts))
    choice = dispatch.choose("self_attention", "auto", "cpu", torch.float32)
    assert choice.backend == expected
    assert ("slower" in choice.reason) == (isa == "generic")
    assert dispatch.choose("self_attention", "cpp", "cpu", torch.float32).backend == "cpp"


@pytest.mark.parametrize(
    ("shape", "heads", "match"),
    [
        ((5, 24), 2, r"must be \(B, N, 3·H·E\), got \(5, 24\)"),
        ((2, 5, 25), 2, r"3 · 2 heads · head width, got 25 in \(2, 5, 25\)"),
        ((2, 5, 24), 3, r"3 · 3 heads · head width, got 24"),
        ((2, 5, 24), 0, r"3 · 0 heads"),
    ],
)
def test_bad_input_is_explained(shape, heads, match):
    with pytest.raises(ValueError, match=match):
        self_attention(torch.randn(shape), heads)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: attention(x[0], x[0], x[0]), ValueError, r"q must be \(B, H, N, E\), got \(2, 5, 4\)"),
        (lambda x: attention(x, x[:, :1], x), ValueError, r"k \(3, 1, 5, 4\) must have the shape of q, \(3, 2, 5, 4\)"),
        (lambda x: attention(x, x, x.half()), TypeError, "v is torch.float16 and q torch.float32; cast one of them"),
        (lambda x: attention(x, x.to("meta"), x), ValueError, "k is on meta and q on cpu"),
        (
            lambda x: attention(x, x, x, lengths=torch.ones(2).long()),
            ValueError,
            r"lengths are \(2,\).*expected \(3,\)",
        ),
        (
            lambda x: self_attention(x[:, 0].repeat(1, 1, 6), 2, bias=x[0, 0, 0]),
            ValueError,
            r"bias \(4,\) must have the",
        ),
        (lambda x: self_attention(x[:, 0].repeat(1, 1, 6), 2, bias=torch.ones(24).int()), TypeError, "bias must be"),
    ],
)
def test_three_tensors_and_biases_that_do_not_fit_are_explained(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.randn(3, 2, 5, 4))
