"""gram_alignment on every backend that runs here, against the reference in fp64."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from layersync_kernels.functional.gram import gram_alignment_loss
from layersync_kernels.ops.gram_alignment import KINDS, op, strips

from ..support.backends import (
    ALL,
    FUSED,
    LOWER_INSTRUCTION_SETS,
    STRIDED,
    assert_as_exact_as,
    device_of,
    moved,
    run_on_lower_instruction_set,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def published(student, teacher, margin=0.0, kind="relu"):
    """The formula in plain PyTorch, in the dtype of the tokens."""
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    distance = (torch.bmm(student, student.mT) - torch.bmm(teacher, teacher.mT)).abs()
    if kind == "abs":
        return torch.where(distance > margin, distance, 0).mean()
    excess = F.relu(distance - margin)
    return excess.square().mean() if kind == "square" else excess.mean()


def run(student, teacher, loss, grad=None, **kwargs):
    """Loss and gradient of one call, on a fresh leaf that keeps the strides."""
    student = student.detach().requires_grad_()
    value = loss(student, teacher, **kwargs)
    return value, *torch.autograd.grad(value, student, torch.ones_like(value) if grad is None else grad)


def on(backend, *tensors):
    return [moved(tensor, device_of(backend)) for tensor in tensors]


def check(student, teacher, backend, **kwargs):
    """Compare a backend with the truth; the yardstick is the published formula in the dtype of the tokens."""
    actual = run(*on(backend, student, teacher), gram_alignment_loss, backend=backend, **kwargs)
    baseline = run(student, teacher.to(student.dtype), published, **kwargs)
    truth = run(student.double(), teacher.double(), gram_alignment_loss, backend="reference", **kwargs)
    assert (actual[0].dtype, actual[1].dtype) == (torch.float32, student.dtype)
    assert_as_exact_as(actual[0].cpu(), baseline[0], truth[0], terms=1)
    if student.dtype == torch.float32:
        # The pull-back subtracts from the gradient of a unit row, at most 2 / N long, what of it lies along the row.
        terms = 2 / student[..., 0].numel() / student.double().norm(dim=-1).min().item()
        assert_as_exact_as(actual[1].cpu(), baseline[1], truth[1], terms=terms)
    else:  # rounded cosines put a few differences on the other side of 0 or of the margin, each a step of the gradient
        resolution, margin = torch.finfo(student.dtype).eps, kwargs.get("margin", 0.0)
        beside = run(student.double(), teacher.double(), published, **{**kwargs, "margin": margin + resolution / 2})
        error, *allowed = (
            (gradient.cpu().double() - truth[1]).norm() for gradient in (actual[1], baseline[1], beside[1])
        )
        assert error <= 2 * max(allowed) + resolution * truth[1].norm()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_values_and_gradients(backend, kind, dtype, poisoned_memory):
    student, teacher = torch.randn(3, 33, 40).to(dtype), torch.randn(3, 33, 24).to(dtype)
    for margin in (0.0, 0.1):
        check(student, teacher, backend, kind=kind, margin=margin)


@pytest.mark.parametrize("backend", FUSED)
def test_strips_and_odd_sizes(backend, monkeypatch, poisoned_memory):
    """A short last strip, a group with fewer samples, strips of one row; neither width a multiple of anything."""
    student, teacher = torch.randn(3, 37, 5), torch.randn(3, 37, 7)
    for cut in ((16, 2), (37, 3), (36, 1)):
        monkeypatch.setattr(strips, "cut", lambda *_, cut=cut: strips.Cut(*cut))
        for kind in KINDS:
            check(student, teacher, backend, kind=kind, margin=0.05)
    monkeypatch.setattr(strips, "cut", lambda *_: strips.Cut(1, 2))
    check(student[:, :3], teacher[:, :3], backend)


@pytest.mark.parametrize("backend", FUSED)
def test_more_tokens_than_a_strip_has_rows(backend):
    check(torch.randn(1, 257, 5), torch.randn(1, 257, 40), backend)


def test_half_products_as_on_a_gpu(monkeypatch):
    """fp16 unit rows, derivatives in fp16, and products of them that are fp32: without a card, by the interpreter."""
    (backend,) = (backend for backend in FUSED if backend.values == ("triton",))
    if backend.marks:
        pytest.skip("no Triton")
    plain = torch.bmm

    def bmm(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.float16
        return plain(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "bmm", bmm if not torch.cuda.is_available() else plain)
    monkeypatch.setattr(strips, "product_dtype", lambda *_: torch.float16)
    monkeypatch.setattr(strips, "cut", lambda *_: strips.Cut(16, 2))
    student, teacher = torch.randn(3, 40, 8).bfloat16(), torch.randn(3, 40, 24).bfloat16()
    for kind in KINDS:
        actual = run(*on("triton", student, teacher), gram_alignment_loss, kind=kind, backend="triton")
        truth = run(student.double(), teacher.double(), gram_alignment_loss, kind=kind)
        assert abs(actual[0] - truth[0]) < 1e-3 * truth[0]
        assert (actual[1].cpu() - truth[1]).norm() < 3e-2 * truth[1].norm()


@pytest.mark.parametrize("tokens", [256, 257, 4096])
@pytest.mark.parametrize("cpu", [True, False])
def test_strips_cover_the_tokens_and_stay_small(tokens, cpu):
    height, samples = strips.cut(16, tokens, cpu)
    assert 1 <= height <= min(tokens, 512 if cpu else 2048)
    assert 1 <= samples <= 16
    assert samples == 1 or samples * height * tokens <= 1 << 24
    assert strips.cut(0, 0, cpu) == (1, 1)


@pytest.mark.parametrize("backend", ALL)
def test_published_formulas(backend):
    """VideoREPA's relation distillation (margin 0.1), VA-VAE's matrix term, U-REPA's and SARA's mean square."""
    student, teacher = torch.randn(2, 12, 16), torch.randn(2, 12, 24)
    s = student / student.norm(dim=-1, keepdim=True)
    t = teacher / teacher.norm(dim=-1, keepdim=True)
    difference = torch.einsum("bic,bjc->bij", s, s) - torch.einsum("bic,bjc->bij", t, t)
    inputs = on(backend, student, teacher)
    for kwargs, expected in (
        ({"margin": 0.1}, (difference.abs() - 0.1).clamp(min=0).mean()),
        ({}, difference.abs().mean()),
        ({"kind": "abs"}, difference.abs().mean()),
        ({"kind": "square"}, difference.square().mean()),
    ):
        torch.testing.assert_close(gram_alignment_loss(*inputs, backend=backend, **kwargs).cpu(), expected)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("view", STRIDED)
def test_any_strides_and_leading_dimensions(backend, view):
    student, teacher = on(backend, STRIDED[view](torch.randn(3, 6, 40)), torch.randn(3, 6, 24).transpose(0, 1))
    teacher = teacher.transpose(0, 1)
    grad = torch.randn(1, device=student.device).expand(3)
    kwargs = {"reduction": "none", "backend": backend}
    actual = run(student, teacher, gram_alignment_loss, grad, **kwargs)
    expected = run(student.contiguous(), teacher.contiguous(), gram_alignment_loss, grad.contiguous(), **kwargs)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    for shape in ((6,), (1, 3, 6), (3, 1, 6)):
        same = gram_alignment_loss(
            student.reshape(*shape, -1)[..., :3, :], teacher.reshape(*shape, -1)[..., :3, :], **kwargs
        )
        assert same.shape == shape[:-1]


@pytest.mark.parametrize("backend", ALL)
def test_zero_and_huge_rows(backend):
    student, teacher = torch.randn(2, 5, 40), torch.randn(2, 5, 40)
    student[0, 1], teacher[1, 2], student[1, 3] = 0, 0, 1e-9
    student[0, 2] *= 1e30
    student[0, 3] *= 1e-5 / student[0, 3].norm()
    actual = run(*on(backend, student, teacher), gram_alignment_loss, backend=backend)
    truth = run(student.double(), teacher.double(), gram_alignment_loss)
    torch.testing.assert_close(actual[0].cpu().double(), truth[0], rtol=1e-6, atol=0)
    scale = truth[1].abs().amax(dim=-1, keepdim=True)
    assert (actual[1][0, 1].cpu() == 0).all()
    assert (actual[1][1, 3].cpu() == 0).all()
    assert ((actual[1].cpu().double() - truth[1]).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_shows_in_its_sample(backend, side, poison):
    for kind in KINDS:
        pair = [torch.randn(2, 5, 40), torch.randn(2, 5, 24)]
        pair[side][1, 2, 3] = poison
        values, gradient = run(*on(backend, *pair), gram_alignment_loss, kind=kind, reduction="none", backend=backend)
        assert values.isnan().tolist() == [False, True]
        assert gradient[0].isfinite().all()
        assert gradient[1].isnan().any() or (backend == "reference" and side == 1)


@pytest.mark.parametrize("backend", ALL)
def test_masked_tokens_may_hold_anything(backend):
    student, teacher = torch.randn(4, 6, 40), torch.randn(4, 6, 24)
    mask = torch.rand(4, 6) > 0.4
    mask[0], mask[1], mask[2, :2] = True, False, True
    inside = [gram_alignment_loss(s[m], t[m]) for s, t, m in zip(student, teacher, mask, strict=True) if m.any()]
    inputs = on(backend, student, teacher, mask)
    one = mask.new_tensor([True, False, False, False, False, False]).to(inputs[0].device)
    assert gram_alignment_loss(*inputs[:2], mask=one, backend=backend) <= 1e-6  # the limit of one token
    assert gram_alignment_loss(*inputs[:2], mask=one[1:2], backend=backend) == 0
    student[~mask], teacher[~mask] = float("nan"), float("inf")
    inputs = on(backend, student, teacher, mask)
    loss, gradient = run(*inputs[:2], gram_alignment_loss, mask=inputs[2], backend=backend)
    torch.testing.assert_close(loss.cpu(), torch.stack(inside).mean())  # the sample without tokens does not count
    assert (gradient.cpu()[~mask] == 0).all()
    assert gradient.cpu()[mask].isfinite().all()
    values = gram_alignment_loss(*inputs[:2], mask=inputs[2], reduction="none", backend=backend)
    assert values[1] == 0


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0), (0, 0)])
def test_no_tokens_or_no_channels_give_zero(backend, shape):
    (tokens,) = on(backend, torch.randn(shape))
    loss, gradient = run(tokens, tokens, gram_alignment_loss, backend=backend)
    assert loss == 0
    assert gradient.shape == shape
    assert (gradient == 0).all()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_memory_is_linear_in_the_tokens():
    tokens, width = 2048, 8
    student, teacher = torch.randn(1, tokens, width, requires_grad=True), torch.randn(1, tokens, width)
    with Largest() as eager:
        published(student, teacher).backward()
    assert eager.elements == tokens**2
    # Below autograd the op's own operators are seen only where it is called as a function.
    with Largest() as fused:
        strips.run(strips.library_strip(op.STRIP["cpp"]), student.detach(), teacher, None, 0.0, 0, 1e-6, True)
    assert tokens * 2 * width <= fused.elements <= tokens * (2 * width + 256)


CALLS = {"gram_alignment_loss": lambda x, backend: gram_alignment_loss(x, x.detach().square(), backend=backend)}


def raw_samples(backend):
    """Arguments of every raw op, for test_registry.py."""
    student, teacher = on(backend, torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 4))
    for mask in (None, torch.rand(2, 3, 5, device=student.device) > 0.5):
        for gradient in (False, True):
            yield "gram_alignment", (student, teacher, mask, 0.1, 0, 1e-6, gradient)
    if backend in op.STRIP:
        difference = torch.randn(2, 3, 5, device=student.device)
        for kind, gradient in itertools.product(KINDS.values(), (None, torch.empty_like(difference))):
            yield "gram_alignment_strip", (difference, 3, 0.1, kind, gradient)


@pytest.mark.parametrize("backend", FUSED)
def test_fullgraph_compile_equals_eager_and_does_not_recompile(backend):
    torch._dynamo.reset()

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=True)
    def step(student, teacher, mask):
        return gram_alignment_loss(2 * student, teacher, mask=mask, margin=0.1, backend=backend)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 3), (4, 5), (6, 7)):
            student, teacher, mask = on(
                backend, torch.randn(batch, tokens, 8), torch.randn(batch, tokens, 4), torch.rand(batch, tokens) > 0.3
            )
            student.requires_grad_()
            compiled = step(student, teacher, mask)
            eager = gram_alignment_loss(2 * student, teacher, mask=mask, margin=0.1, backend=backend)
            assert torch.equal(compiled, eager)
            for a, e in zip(torch.autograd.grad(compiled, student), torch.autograd.grad(eager, student), strict=True):
                assert torch.equal(a, e)


@pytest.mark.parametrize("backend", ALL)
def test_autocast_does_not_reach_the_products(backend):
    student, teacher = on(backend, torch.randn(2, 5, 40), torch.randn(2, 5, 24))
    expected, gradient = run(student, teacher, gram_alignment_loss, backend=backend)
    with torch.autocast(student.device.type, dtype=torch.bfloat16):
        loss = gram_alignment_loss(student.requires_grad_(), teacher, backend=backend)
    assert torch.equal(loss, expected)
    assert torch.equal(*torch.autograd.grad(loss, student), gradient)


@pytest.mark.parametrize("backend", ALL)
def test_functional_gradient_and_checkpoints(backend):
    student, teacher = on(backend, torch.randn(2, 5, 40), torch.randn(2, 5, 24))
    loss = functools.partial(gram_alignment_loss, teacher=teacher, backend=backend)
    _, expected = run(student, teacher, gram_alignment_loss, backend=backend)
    assert torch.equal(torch.func.grad(loss)(student), expected)
    for reentrant in (False, True):
        leaf = student.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(loss, leaf, use_reentrant=reentrant).backward()
        assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("backend", FUSED)
def test_backward_twice_and_second_derivatives(backend):
    student, teacher = on(backend, torch.randn(2, 5, 40), torch.randn(2, 5, 24))
    leaf = student.requires_grad_()
    loss = gram_alignment_loss(leaf, teacher.requires_grad_(), backend=backend)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward(torch.full_like(loss, 2))
    assert torch.equal(leaf.grad, 3 * once)
    assert teacher.grad is None
    (gradient,) = torch.autograd.grad(gram_alignment_loss(leaf, teacher, backend=backend), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_second_derivatives_and_fp64_through_the_reference():
    student, teacher = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    for kind, margin in itertools.product(KINDS, (0.0, 0.1)):
        assert torch.autograd.gradgradcheck(
            lambda s, kind=kind, margin=margin: gram_alignment_loss(s, teacher, kind=kind, margin=margin),
            student.requires_grad_(),
        )
    assert gram_alignment_loss(student.float(), teacher).dtype == torch.float64


def test_gradients_of_fp16_do_not_vanish_before_the_loss_scale():
    student, teacher = torch.randn(1, 300, 8).half(), torch.randn(1, 300, 8)
    scale = torch.tensor(2.0**16)
    _, scaled = run(100 * student, teacher, gram_alignment_loss, scale)
    _, exact = run(100 * student.float(), teacher, gram_alignment_loss)
    assert exact.abs().median() < torch.finfo(torch.float16).tiny
    torch.testing.assert_close(scaled.float() / scale, exact, rtol=1e-2, atol=1e-8)


@pytest.mark.threads
def test_results_do_not_depend_on_the_number_of_threads():
    difference = torch.randn(2, 37, 300)
    first = op.STRIP["cpp"](difference, 37, 0.1, 0, None)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(op.STRIP["cpp"](difference, 37, 0.1, 0, None), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", LOWER_INSTRUCTION_SETS)
def test_lower_instruction_sets_pass_the_same_tests(isa):
    run_on_lower_instruction_set(isa, __file__, "cpp and (values or nan)")


@pytest.mark.parametrize("backend", [backend for backend in FUSED if backend.values != ("triton",)])
def test_raw_strips_refuse_what_does_not_fit(backend):
    (difference,) = on(backend, torch.randn(2, 3, 4))
    for arguments, match in (
        ((difference[0], 1, 0.0, 0, None), r"shape \(samples, rows, columns\)"),
        ((difference.long(), 1, 0.0, 0, None), "takes float32"),
        ((difference, 5, 0.0, 0, None), "5 columns that count once, of 4"),
        ((difference, 1, 0.0, 3, None), "unknown kind 3"),
        ((difference, 1, 0.0, 0, difference[:1]), "dimension 0: 1 and 2"),
        ((difference, 1, 0.0, 0, difference.bfloat16()), "gradient must"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op.STRIP[backend.values[0] if hasattr(backend, "values") else backend](*arguments)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"teacher": torch.randn(2, 4, 8)}, ValueError, "3 student tokens and 4 teacher tokens.*interpolate"),
        ({"teacher": torch.randn(1, 3, 8)}, ValueError, r"\(2, 3, 8\) and teacher \(1, 3, 8\)"),
        ({"student": torch.randn(2, 1, 8), "teacher": torch.randn(2, 1, 8)}, ValueError, "one token a sample"),
        ({"teacher": torch.randn(8)}, ValueError, r"teacher must be \(..., N, D\), got \(8,\)"),
        ({"teacher": [1.0]}, TypeError, "got list"),
        ({"teacher": torch.ones(2, 3, 8, dtype=torch.long)}, TypeError, "got torch.int64"),
        ({"teacher": torch.ones(2, 3, 8, device="meta")}, ValueError, "student is on cpu and teacher on meta"),
        ({"margin": -0.1}, ValueError, "margin must not be negative, got -0.1"),
        ({"margin": float("nan")}, ValueError, "margin must not be negative, got nan"),
        ({"kind": "l2"}, ValueError, "unknown kind='l2'; expected one of 'relu', 'square', 'abs'"),
        ({"reduction": "sum"}, ValueError, "unknown reduction='sum'"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask of shape \(2,\) does not broadcast"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta"),
    ],
)
def test_bad_input_is_explained(kwargs, error, match):
    arguments = {"student": torch.randn(2, 3, 8), "teacher": torch.randn(2, 3, 8), **kwargs}
    with pytest.raises(error, match=match):
        gram_alignment_loss(arguments.pop("student"), arguments.pop("teacher"), **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
class TestOnACard:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_is_as_exact_as_the_published_formula(self, backend, dtype):
        check(torch.randn(2, 1300, 72).to(dtype), torch.randn(2, 1300, 48).to(dtype), backend)

    def test_graph_replays_and_waits_for_nothing(self, backend):
        student = torch.randn(2, 600, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        teacher = torch.randn(2, 600, 32, device="cuda", dtype=torch.bfloat16)
        step = functools.partial(run, loss=gram_alignment_loss, backend=backend)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(student, teacher)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(student, teacher)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(student, teacher)
        with torch.no_grad():
            student.normal_()
        graph.replay()
        for replayed, eager in zip(captured, step(student, teacher), strict=True):
            assert torch.equal(replayed, eager)
