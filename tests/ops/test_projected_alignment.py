"""projected_alignment on every backend that runs here, against the fp64 reference."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from layersync_kernels.functional.cosine import layersync_loss
from layersync_kernels.functional.projected import projected_alignment_loss
from layersync_kernels.ops.cosine_alignment.op import IN_PLACE
from layersync_kernels.ops.projected_alignment import chunks

from ..support.backends import (
    ALL,
    FUSED,
    HAS_GPU,
    STRIDED,
    assert_as_exact_as,
    device_of,
    moved,
    run_on_lower_instruction_set,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Few rows are several chunks, the last of them smaller than the others."""
    for name in ("_CHUNK_BYTES", "_LINEAR_BYTES"):
        monkeypatch.setattr(chunks, name, {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(chunks, "_FEWEST_ROWS", 4)


def inputs(*leading, width=5, projected=7, dtype=torch.float32, device="cpu"):
    """Hidden, weight, bias and teacher; leaves are made by `run`."""
    shapes = ((*leading, width), (projected, width), (projected,), (*leading, projected))
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def run(hidden, weight, bias, teacher, backend, *, grad=None, **kwargs):
    """Loss and gradients of one call, on fresh leaves that keep the strides."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)]
    loss = projected_alignment_loss(*leaves, teacher, backend=backend, **kwargs)
    wanted = [x for x in leaves if x is not None]
    return loss, *torch.autograd.grad(loss, wanted, torch.ones_like(loss) if grad is None else grad)


def move(value, backend):
    return moved(value, device_of(backend)) if isinstance(value, torch.Tensor) else value


def check(tensors, backend, *, grad=None, **kwargs):
    """Compare a backend with the truth: the reference in fp64; the yardstick is the reference in the inputs' dtype."""
    if backend == "triton" and not HAS_GPU and tensors[0].dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bf16 matrices wrongly")
    options = {name: move(value, backend) for name, value in kwargs.items()}
    actual = run(*(move(x, backend) for x in tensors), backend, grad=move(grad, backend), **options)
    baseline = run(*tensors, "reference", grad=grad, **kwargs)
    exact = [None if x is None else x.double() for x in tensors]
    truth = run(*exact, "reference", grad=None if grad is None else grad.double(), **kwargs)
    terms = tensors[0][..., 0].numel() if kwargs.get("reduction") == "sum" else 1
    assert_as_exact_as(actual[0].cpu(), baseline[0], truth[0], terms=terms)
    for a, b, t, leaf in zip(actual[1:], baseline[1:], truth[1:], [x for x in tensors if x is not None], strict=False):
        assert a.dtype == leaf.dtype
        assert_as_exact_as(a.cpu(), b, t, terms=0.1)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_values_and_gradients(backend, dtype, reduction, poisoned_memory):
    tensors = inputs(3, 5, dtype=dtype)
    grad = torch.randn(3, 5) if reduction == "none" else torch.tensor(0.7)
    weight = torch.rand(3, 5) * (torch.rand(3, 5) > 0.3)
    check(tensors, backend, reduction=reduction, grad=grad)
    check(tensors, backend, reduction=reduction, grad=grad, token_weight=weight)
    check([*tensors[:2], None, tensors[3].float()], backend, reduction=reduction, grad=grad)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("rows", "width", "projected"), [(1, 1, 2), (5, 64, 33), (10, 72, 300), (2, 7, 257)])
def test_any_size(backend, dtype, rows, width, projected, poisoned_memory):
    check(inputs(rows, width=width, projected=projected, dtype=dtype), backend)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", STRIDED)
def test_any_row_stride(backend, name):
    hidden, weight, bias, teacher = inputs(3, 5, dtype=torch.float16)
    view = STRIDED[name]
    check([view(hidden), weight, bias, teacher], backend)
    check([hidden, weight.t().contiguous().t(), bias.repeat_interleave(2)[::2], view(teacher)], backend)
    check([view(hidden), weight, bias, view(teacher).float()], backend, reduction="none", grad=torch.randn(5, 3).t())


@pytest.mark.parametrize("backend", ALL)
def test_any_leading_dimensions(backend):
    for leading in ((), (1,), (9,), (2, 3, 4), (2, 1, 3, 2)):
        tensors = [move(x, backend) for x in inputs(*leading)]
        expected = -F.cosine_similarity(F.linear(*tensors[:3]), tensors[3], dim=-1)
        for reduction in ("mean", "none"):
            loss, d_hidden, *_ = run(*tensors, backend, reduction=reduction)
            torch.testing.assert_close(loss, expected.mean() if reduction == "mean" else expected)
            assert d_hidden.shape == (*leading, 5)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
def test_zero_huge_and_nan_rows(backend, dtype):
    hidden, weight, _, teacher = inputs(8, width=8, projected=300)
    hidden, weight, teacher = hidden.to(dtype), weight.to(dtype), teacher.clone()
    hidden[1], teacher[2], hidden[3], teacher[4], teacher[6], teacher[7, 280:] = (
        0,
        0,
        float("nan"),
        float("inf"),
        1e30,
        1e30,
    )
    teacher[5] *= 1e-25
    if dtype == torch.float32:
        hidden[6] *= 1e28
    tensors = [move(x, backend) for x in (hidden, weight, teacher)]
    loss, d_hidden, _ = run(*tensors[:2], None, tensors[2], backend, reduction="none", eps=1e-30)
    exact, d_exact, _ = run(
        hidden.double(), weight.double(), None, teacher.double(), "reference", reduction="none", eps=1e-30
    )
    assert torch.equal(loss.isnan().cpu(), torch.tensor([i in (3, 4) for i in range(8)]))
    rows = torch.tensor([0, 1, 2, 5, 6, 7])
    torch.testing.assert_close(loss.cpu()[rows].double(), exact[rows], rtol=0, atol=1e-3)
    d_hidden, d_exact = d_hidden.cpu()[rows].double(), d_exact[rows]
    scale = d_exact.abs().amax(dim=-1, keepdim=True) + (d_exact == 0).all(dim=-1, keepdim=True)
    torch.testing.assert_close(d_hidden / scale, d_exact / scale, rtol=0, atol=1e-2 if dtype == torch.float16 else 1e-4)
    assert (d_hidden[1:3] == 0).all()


@pytest.mark.parametrize("backend", [*ALL, "auto"])
def test_masked_tokens_may_hold_anything(backend):
    hidden, weight, bias, teacher = (move(x, backend) for x in inputs(2, 6))
    mask = move(torch.tensor([[True, False, True, True, False, True], [False] * 6]), backend)
    expected = run(hidden[mask], weight, bias, teacher[mask], backend)
    hidden[~mask], teacher[~mask] = float("nan"), float("inf")
    loss, d_hidden, *others = run(hidden, weight, bias, teacher, backend, mask=mask)
    for actual, e in zip((loss, d_hidden[mask], *others), expected, strict=True):
        torch.testing.assert_close(actual, e)
    assert (d_hidden[~mask] == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_nothing_to_align_gives_zero(backend):
    hidden, weight, bias, teacher = (move(x, backend) for x in inputs(2, 3))
    for kwargs in ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, {"token_weight": torch.tensor([[1.0], [-1.0]])}):
        options = {name: move(value, backend) for name, value in kwargs.items()}
        results = run(hidden * 0 + 1, weight, bias, teacher * 0 + 1, backend, **options)
        assert all((x == 0).all() for x in results)
    for rows, width, projected in ((0, 5, 7), (3, 0, 7), (3, 5, 0)):
        tensors = [move(x, backend) for x in inputs(rows, width=width, projected=projected)]
        loss, *gradients = run(*tensors, backend)
        assert loss == 0 or width == 0  # without channels the bias is what is compared
        assert [g.shape for g in gradients] == [x.shape for x in tensors[:3]]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_computes_the_wanted_gradients_alone(backend, reduction):
    hidden, weight, bias, teacher = (move(x, backend) for x in inputs(9))
    everything = run(hidden, weight, bias, teacher, backend, reduction=reduction)[1:]
    for frozen in ((0,), (1, 2), (0, 1), (0, 1, 2)):
        leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate((hidden, weight, bias))]
        teacher_leaf = teacher.clone().requires_grad_()
        loss = projected_alignment_loss(*leaves, teacher_leaf, reduction=reduction, backend=backend)
        assert loss.requires_grad == (len(frozen) < 3)
        if not loss.requires_grad:
            continue
        sizes = [x.numel() for x in getattr(loss.grad_fn, "kept", None) or [loss] * 4][1:]
        if reduction == "mean":
            assert [size > 0 for size in sizes] == [i not in frozen for i in range(3)]
        loss.sum().backward()
        assert teacher_leaf.grad is None
        for i, (leaf, expected) in enumerate(zip(leaves, everything, strict=True)):
            assert (leaf.grad is None) if i in frozen else torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice_gives_the_gradients_twice(backend, reduction):
    """The first pass scales what it finds in place."""
    leaves = [move(x, backend).requires_grad_() for x in inputs(9)[:3]]
    loss = projected_alignment_loss(
        *leaves, move(torch.randn(9, 7), backend), reduction=reduction, backend=backend
    ).sum()
    first = torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.3), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.6))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_gradients_of_fp16_do_not_vanish_before_the_loss_scale():
    """1/Σw of a large batch, times 1/|z|, is below the smallest value of fp16."""
    hidden, weight, bias, teacher = inputs(20_000, width=8, projected=32)
    expected = run(hidden, weight, bias, teacher, "reference", grad=torch.tensor(65536.0))
    actual = run(*(x.half() for x in (hidden, weight, bias, teacher)), "cpp", grad=torch.tensor(65536.0))
    for a, e in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(a.float() / e.abs().max(), e / e.abs().max(), rtol=0, atol=4e-3)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an op within makes, but for those of one size."""

    def __init__(self, but):
        super().__init__()
        self.but, self.numel = but, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in result if isinstance(result, (tuple, list)) else (result,):
            new = isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given  # no view
            if new and x.numel() != self.but:
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_projected_tensor_is_ever_whole(backend, reduction):
    hidden, weight, bias, teacher = (move(x, backend).half() for x in inputs(3, 14, width=6, projected=64))
    hidden, teacher = hidden[:, 1:], teacher[:, 1:]  # without a class token, as a teacher's features come
    with Largest(but=hidden.numel()) as largest:
        run(hidden, weight, bias, teacher, backend, reduction=reduction)
    assert 4 * 64 <= largest.numel <= 7 * 64  # a chunk of z, the weight


CALLS = {
    "projected_alignment_loss": lambda x, backend: projected_alignment_loss(
        x, torch.linspace(-1, 1, 64, dtype=x.dtype).view(8, 8), None, x.detach().flip(1), backend=backend
    )
}


def raw_samples(backend):
    """Arguments of the raw op, for test_registry.py."""
    hidden, weight, bias, teacher = (move(x, backend) for x in inputs(3, 3))
    row_weight = move(torch.rand(9), backend)
    for options in (
        (None, None, 1e-6, 1, True, True, True),
        (row_weight, None, 1e-6, 0, False, False, False),
        (row_weight, torch.ones_like(teacher[..., 0]), 1e-6, 0, True, False, True),
    ):
        yield "projected_alignment", (hidden, weight, bias, teacher, *options)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph_compile_equals_eager_and_does_not_recompile(backend, reduction):
    device = device_of(backend)
    torch._dynamo.reset()
    layer = torch.nn.Linear(5, 7, device=device)

    def step(hidden, teacher, mask):
        loss = projected_alignment_loss(
            2 * hidden, layer.weight, layer.bias, teacher, mask=mask, reduction=reduction, backend=backend
        )
        return 0.3 * loss.sum()

    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 3), (3, 4)):
            hidden = torch.randn(batch, tokens, 5, device=device, requires_grad=True)
            rest = torch.randn(batch, tokens, 7, device=device), torch.rand(batch, tokens, device=device) > 0.5
            wanted = (hidden, layer.weight, layer.bias)
            compiled, eager = compiled_step(hidden, *rest), step(hidden, *rest)
            torch.testing.assert_close(compiled, eager)
            for a, e in zip(torch.autograd.grad(compiled, wanted), torch.autograd.grad(eager, wanted), strict=True):
                torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ALL)
def test_autocast_is_that_of_a_linear_layer(backend):
    device = device_of(backend)
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    hidden, weight, bias, teacher = (move(x, backend) for x in inputs(2, 5))
    with torch.autocast(device, dtype=dtype):
        loss, *gradients = run(hidden, weight, bias, teacher, backend)
        expected = layersync_loss(F.linear(hidden, weight, bias), teacher, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    assert {g.dtype for g in gradients} == {torch.float32}
    for g, e in zip(gradients, run(hidden, weight, bias, teacher, backend)[1:], strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=2e-2)


@pytest.mark.parametrize("backend", ALL)
def test_functional_gradient(backend):
    hidden, weight, bias, teacher = (move(x, backend) for x in inputs(9))

    def loss(hidden, weight):
        return projected_alignment_loss(hidden, weight, bias, teacher, backend=backend)

    actual = torch.func.grad(loss, argnums=(0, 1))(hidden, weight)
    for a, e in zip(actual, run(hidden, weight, bias, teacher, backend)[1:3], strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(backend, use_reentrant):
    layer = torch.nn.Linear(5, 7, device=device_of(backend))
    hidden, _, _, teacher = (move(x, backend) for x in inputs(9))
    hidden.requires_grad_()

    def block(hidden):
        return projected_alignment_loss(hidden.sin(), layer.weight, layer.bias, teacher, backend=backend)

    expected = torch.autograd.grad(block(hidden), (hidden, layer.weight))
    torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=use_reentrant).backward()
    for a, e in zip((hidden.grad, layer.weight.grad), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_an_error(backend, reduction):
    hidden, weight, bias, teacher = (move(x, backend) for x in inputs(9))
    hidden.requires_grad_()
    loss = projected_alignment_loss(hidden, weight, bias, teacher, reduction=reduction, backend=backend).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", FUSED)
def test_results_are_deterministic(backend):
    tensors = [move(x, backend) for x in inputs(33)]
    for a, b in zip(run(*tensors, backend), run(*tensors, backend), strict=True):
        assert torch.equal(a, b)


def test_auto_takes_the_linear_layer_for_few_rows():
    hidden, weight, bias, teacher = inputs(9)
    few, many = (
        projected_alignment_loss(hidden[:rows], weight.requires_grad_(), bias, teacher[:rows]) for rows in (4, 9)
    )
    assert (few.grad_fn.name(), many.grad_fn.name()) == (
        "CosineAlignmentBackward",
        "ProjectedAlignmentBackward",
    )


@pytest.mark.threads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_cpp_sums_of_the_bias_do_not_depend_on_threads(dtype):
    """A part of the rows is a task, whoever runs it; the GEMMs are the library's."""
    z, teacher = torch.randn(1001, 33).to(dtype), torch.randn(1001, 33)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            dz = z.clone()
            loss, sums = IN_PLACE["cpp"](dz, teacher, None, torch.ones(()), 1e-6, 0.5, 2, True)
            results.append((loss, sums, dz))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    torch.testing.assert_close(results[0][1][0], results[0][2].float().sum(dim=0), rtol=1e-5, atol=1e-5)


def test_a_lower_instruction_set_passes_the_same_tests():
    run_on_lower_instruction_set("avx2", __file__, "cpp and (values or size or huge or masked)")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graph_replays_with_new_inputs(backend):
    """In a capture nothing may wait for the card."""
    tensors = inputs(4, 64, width=1152, projected=768, dtype=torch.bfloat16, device="cuda")
    mask = torch.rand(4, 64, device="cuda") > 0.3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(*tensors, backend, mask=mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*tensors, backend, mask=mask)
    for x in tensors:
        x.normal_()
    graph.replay()
    for replayed, eager in zip(captured, run(*tensors, backend, mask=mask), strict=True):
        torch.testing.assert_close(replayed, eager)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"teacher": torch.randn(2, 4, 7)}, ValueError, r"\(2, 3\) is not \(2, 4\); drop extra tokens, or interpolate"),
        ({"teacher": torch.randn(2, 3, 8)}, ValueError, r"8 channels and weight \(7, 5\) projects to 7"),
        ({"teacher": torch.randn(2, 3, 7).long()}, TypeError, "teacher must be float32"),
        ({"teacher": torch.randn(2, 3, 7, device="meta")}, ValueError, "teacher is on meta and hidden on cpu"),
        ({"hidden": [1.0]}, TypeError, "hidden must be a tensor"),
        ({"weight": torch.randn(7, 4)}, ValueError, r"weight \(7, 4\) must have the shape \(out, 5\)"),
        ({"bias": torch.randn(5)}, ValueError, r"bias \(5,\) must have the shape \(7,\)"),
        ({"bias": torch.randn(7).half()}, TypeError, "hidden, weights and biases must have one dtype"),
        ({"reduction": "avg"}, ValueError, "projected_alignment_loss: unknown reduction='avg'"),
        ({"eps": 0.0}, ValueError, "projected_alignment_loss: eps must be positive"),
        ({"mask": torch.ones(2, 3)}, TypeError, "projected_alignment_loss: mask must be bool"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask of shape \(2, 4\) does not broadcast"),
    ],
)
def test_bad_input_is_explained(kwargs, error, match):
    arguments = dict(zip(("hidden", "weight", "bias", "teacher"), inputs(2, 3), strict=True)) | kwargs
    with pytest.raises(error, match=match):
        projected_alignment_loss(**arguments)
