"""cosine_alignment on every backend that runs here, against the fp64 reference."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from layersync_kernels import layersync_loss
from layersync_kernels.ops import dispatch
from layersync_kernels.ops.cosine_alignment import op

from ..support.backends import (
    ALL,
    FUSED,
    HAS_GPU,
    LOWER_INSTRUCTION_SETS,
    STRIDED,
    assert_as_exact_as,
    device_of,
    moved,
    run_on_lower_instruction_set,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def run(student, teacher, backend, *, teacher_grad=False, grad=None, **kwargs):
    """Loss and gradients of one call, on fresh leaves that keep the strides."""
    leaves = [x.detach().requires_grad_() for x in (student, teacher)]
    loss = layersync_loss(*leaves, teacher_grad=teacher_grad, backend=backend, **kwargs)
    wanted = leaves if teacher_grad else leaves[:1]
    return loss, *torch.autograd.grad(loss, wanted, torch.ones_like(loss) if grad is None else grad)


def check(student, teacher, backend, *, grad=None, **kwargs):
    """Compare a backend with the truth: the reference in fp64; the yardstick is the reference in the inputs' dtype."""
    device = device_of(backend)
    move = lambda x, dtype=None: None if x is None else x.to(device, dtype or x.dtype)  # noqa: E731
    tensors = {k: move(v) for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    options = {**kwargs, **tensors}
    actual = run(moved(student, device), moved(teacher, device), backend, grad=move(grad), **options)
    baseline = run(student, teacher, "reference", grad=grad, **kwargs)
    if "token_weight" in kwargs:
        kwargs["token_weight"] = kwargs["token_weight"].double()
    truth = run(student.double(), teacher.double(), "reference", grad=None if grad is None else grad.double(), **kwargs)
    assert actual[0].dtype == torch.float32
    for gradient, leaf in zip(actual[1:], (student, teacher), strict=False):
        assert gradient.dtype == leaf.dtype
    # A cosine is a sum of products whose magnitudes add up to at most 1; "sum" adds one of them per row.
    rows, reduction = student[..., 0].numel(), kwargs.get("reduction", "mean")
    assert_as_exact_as(actual[0].cpu(), baseline[0], truth[0], terms=rows if reduction == "sum" else 1)
    # A gradient is a difference of unit rows over a norm: 1 / norm bounds its terms, times 1 / M for the mean.
    rows = rows if reduction == "mean" else 1
    for a, b, t, leaf in zip(actual[1:], baseline[1:], truth[1:], (student, teacher), strict=False):
        norm = leaf.double().norm(dim=-1)
        assert_as_exact_as(a.cpu(), b, t, terms=1 / norm.min().item() / rows)
    return actual


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(FLOATS, FLOATS)), ids=lambda d: "-".join(str(x)[6:] for x in d)
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("teacher_grad", [False, True])
def test_values_and_gradients(backend, dtypes, reduction, teacher_grad, poisoned_memory):
    student, teacher = (torch.randn(3, 5, 72).to(dtype) for dtype in dtypes)
    weight = torch.rand(3, 5) * (torch.rand(3, 5) > 0.3)
    grad = torch.randn(3, 5) if reduction == "none" else torch.tensor(0.7)
    for kwargs in ({}, {"token_weight": weight}):
        check(student, teacher, backend, reduction=reduction, teacher_grad=teacher_grad, grad=grad, **kwargs)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 3, 16, 31, 33, 131, 384, 1152, 1153, 2500])
def test_any_width(backend, dtype, width, poisoned_memory):
    check(torch.randn(7, width).to(dtype), torch.randn(7, width).to(dtype), backend, teacher_grad=True)


@pytest.mark.parametrize("backend", ALL)
def test_any_leading_dimensions(backend):
    for leading in ((), (1,), (5,), (2, 3), (2, 3, 4), (2, 1, 3, 2)):
        shape = (*leading, 40)
        student, teacher = torch.randn(shape), torch.randn(shape)
        device = device_of(backend)
        for reduction in ("mean", "none"):
            loss, gradient = run(student.to(device), teacher.to(device), backend, reduction=reduction)
            expected = -F.cosine_similarity(student, teacher, dim=-1)
            torch.testing.assert_close(loss.cpu(), expected.mean() if reduction == "mean" else expected)
            assert gradient.shape == shape


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("student_view", "teacher_view"), list(itertools.product(STRIDED, STRIDED)))
def test_row_strides_cost_no_copy(backend, student_view, teacher_view, poisoned_memory):
    student = moved(STRIDED[student_view](torch.randn(3, 4, 40)), device_of(backend))
    teacher = moved(STRIDED[teacher_view](torch.randn(3, 4, 40).bfloat16()), device_of(backend))
    assert not student.is_contiguous()
    assert not teacher.is_contiguous()
    with profile() as profiler:
        actual = run(student, teacher, backend, teacher_grad=True)
    copies = {event.name for event in profiler.events()} & {"aten::copy_", "aten::clone"}
    assert not copies or (backend == "triton" and not HAS_GPU)  # Triton's interpreter copies its arguments itself
    expected = run(student.contiguous(), teacher.contiguous(), backend, teacher_grad=True)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1152, 1160])
def test_large_gradients_are_those_of_their_parts(dtype, width, poisoned_memory):
    """From 8 MB on the CPU kernels write past the cache where rows are aligned, by other instructions."""
    student, teacher = torch.randn(4096, width).to(dtype), torch.randn(4096, width).to(dtype)
    student[5] = 0
    whole = run(student, teacher, "auto", teacher_grad=True, reduction="sum")
    for part in torch.arange(4096).chunk(16):
        expected = run(student[part], teacher[part], "auto", teacher_grad=True, reduction="sum")
        for gradient, of_part in zip(whole[1:], expected[1:], strict=True):
            assert torch.equal(gradient[part], of_part)


@pytest.mark.parametrize("backend", FUSED)
def test_layouts_beyond_two_strides_are_copied(backend):
    student = torch.randn(40, 2, 3, 4).permute(1, 2, 3, 0)
    teacher = torch.randn(2, 5, 3, 7, 4, 40)[:, 1, :, 2]
    check(student, teacher[..., :40], backend)
    check(torch.randn(2, 3, 4, 80)[..., ::2], teacher, backend)


@pytest.mark.parametrize("backend", FUSED)
def test_gradients_of_any_stride(backend):
    """A gradient that is expanded, transposed or a slice of a cat must not be read as contiguous."""
    student, teacher = torch.randn(4, 6, 40), torch.randn(4, 6, 40)
    for grad in (
        torch.randn(1, 1).expand(4, 6),
        torch.randn(4, 1).expand(4, 6),
        torch.randn(6, 4).t(),
        torch.randn(4, 13)[:, 3:9],
    ):
        check(student, teacher, backend, reduction="none", grad=grad)


@pytest.mark.parametrize("backend", ALL)
def test_zero_rows_have_cosine_and_gradient_zero(backend):
    student, teacher = torch.randn(4, 40), torch.randn(4, 40)
    student[0], teacher[1], student[2] = 0, 0, 1e-9  # the last one lies under eps
    device = device_of(backend)
    loss, ds, dt = run(student.to(device), teacher.to(device), backend, teacher_grad=True, reduction="none")
    assert torch.equal(loss[:3].cpu(), torch.zeros(3))
    assert torch.equal(ds[:3].cpu(), torch.zeros(3, 40))
    assert torch.equal(dt[:3].cpu(), torch.zeros(3, 40))
    assert loss[3] != 0
    assert ds[3].abs().max() > 0


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [
        (torch.float16, 2000),
        (torch.float16, 65504),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 3e38),
        (torch.float32, 1e30),
        (torch.float32, 1e25),
        (torch.float32, 1e-5),
    ],
)
def test_rows_of_extreme_magnitude_are_right(backend, dtype, magnitude):
    """A row of 1152 values of 2,000 overflows an fp16 norm, one near 1e30 an fp32 sum of squares."""
    signs = torch.randint(0, 2, (2, 3, 1152)) * 2 - 1
    student = (signs * magnitude).to(dtype)
    teacher = (student.float() * (torch.rand(2, 3, 1152) > 0.25)).to(dtype)
    device = device_of(backend)
    loss, ds, dt = run(student.to(device), teacher.to(device), backend, teacher_grad=True, reduction="none")
    truth = run(student.double(), teacher.double(), "reference", teacher_grad=True, reduction="none")
    torch.testing.assert_close(loss.cpu().double(), truth[0], rtol=1e-5, atol=0)
    # Where the true gradient is a normal number of the dtype, the computed one must be right, else it may vanish.
    for actual, expected in ((ds, truth[1]), (dt, truth[2])):
        assert torch.isfinite(actual).all()
        atol = 8 * torch.finfo(dtype).tiny + 4 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_and_infinity_stay_in_their_token(backend, poison, side):
    student, teacher = torch.randn(2, 4, 40), torch.randn(2, 4, 40)
    (student if side == "student" else teacher)[1, 2, 5] = poison
    device = device_of(backend)
    loss, gradient = run(student.to(device), teacher.to(device), backend, reduction="none")
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[1, 2] = True
    assert torch.equal(loss.isnan().cpu(), bad)
    assert torch.equal(gradient.isnan().any(-1).cpu(), bad)
    assert layersync_loss(student.to(device), teacher.to(device), backend=backend).isnan()


@pytest.mark.parametrize("backend", ALL)
def test_a_nan_shows_through_a_zero_partner(backend):
    student, teacher = torch.zeros(1, 40), torch.zeros(1, 40)
    teacher[0, 3] = float("nan")
    loss, _ = run(student.to(device_of(backend)), teacher.to(device_of(backend)), backend)
    assert loss.isnan()


@pytest.mark.parametrize("backend", ALL)
def test_masked_tokens_may_hold_anything(backend):
    student, teacher = torch.randn(2, 4, 40), torch.randn(2, 4, 40)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    device = device_of(backend)
    expected = [
        x.cpu() for x in run(student.to(device), teacher.to(device), backend, mask=mask.to(device), teacher_grad=True)
    ]
    student[~mask], teacher[~mask] = float("nan"), float("inf")
    actual = run(student.to(device), teacher.to(device), backend, mask=mask.to(device), teacher_grad=True)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu(), e)
    manual = -F.cosine_similarity(student[mask], teacher[mask], dim=-1).mean()
    torch.testing.assert_close(actual[0].cpu(), manual)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_masked_gives_zero_with_zero_gradient(backend, reduction, poisoned_memory):
    device = device_of(backend)
    student, teacher = torch.full((2, 4, 40), float("nan"), device=device), torch.randn(2, 4, 40, device=device)
    mask = torch.zeros(2, 4, dtype=torch.bool, device=device)
    loss, gradient = run(student, teacher, backend, mask=mask, reduction=reduction)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("backend", ALL)
def test_weights_that_cancel_give_zero(backend):
    device = device_of(backend)
    weight = torch.tensor([1.0, -1.0], device=device)
    loss, gradient = run(
        torch.randn(2, 40, device=device), torch.randn(2, 40, device=device), backend, token_weight=weight
    )
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("backend", ALL)
def test_mask_and_weight_multiply_and_broadcast(backend):
    student, teacher = torch.randn(3, 4, 40), torch.randn(3, 4, 40)
    cosine = F.cosine_similarity(student, teacher, dim=-1)
    per_token, per_sample, per_position = torch.rand(3, 4) > 0.4, torch.rand(3), torch.rand(4)
    device = device_of(backend)
    for mask, weight, full in (
        (per_token, None, per_token.float()),
        (None, per_sample, per_sample[:, None].expand(3, 4)),
        (None, per_sample[:, None], per_sample[:, None].expand(3, 4)),
        (None, per_position, per_position.expand(3, 4)),
        (per_token, per_sample[:, None].half(), per_token * per_sample[:, None].half().float()),
        (per_sample > 0.5, per_position, (per_sample > 0.5)[:, None] * per_position),
        (None, torch.tensor(0.5), torch.full((3, 4), 0.5)),
    ):
        kwargs = {
            "mask": None if mask is None else mask.to(device),
            "token_weight": None if weight is None else weight.to(device),
        }
        for reduction, expected in (
            ("none", -full * cosine),
            ("sum", -(full * cosine).sum()),
            ("mean", -(full * cosine).sum() / full.sum()),
        ):
            loss, _ = run(student.to(device), teacher.to(device), backend, reduction=reduction, **kwargs)
            torch.testing.assert_close(loss.cpu(), expected)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (0,), (2, 3, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_or_no_channels_give_zero(backend, shape, reduction):
    device = device_of(backend)
    student, teacher = torch.randn(shape, device=device), torch.randn(shape, device=device)
    loss, gradient = run(student, teacher, backend, reduction=reduction)
    assert torch.equal(loss, torch.zeros(shape[:-1] if reduction == "none" else (), device=device))
    assert gradient.shape == shape


@pytest.mark.parametrize("backend", ALL)
def test_teacher_is_a_constant_unless_asked(backend):
    student = torch.randn(4, 40, device=device_of(backend), requires_grad=True)
    teacher = torch.randn(4, 40, device=device_of(backend), requires_grad=True)
    layersync_loss(student, teacher, backend=backend).backward()
    assert student.grad is not None
    assert teacher.grad is None
    layersync_loss(student.detach(), teacher, teacher_grad=True, backend=backend).backward()
    assert teacher.grad is not None


@pytest.mark.threads
@pytest.mark.parametrize("backend", FUSED)
def test_results_are_deterministic(backend):
    device = device_of(backend)
    student, teacher = torch.randn(257, 65, device=device), torch.randn(257, 65, device=device)
    first = run(student, teacher, backend, teacher_grad=True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for a, e in zip(run(student, teacher, backend, teacher_grad=True), first, strict=True):
                assert torch.equal(a, e)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", FUSED)
def test_saves_at_most_16_bytes_a_row_beyond_the_inputs(backend):
    device = device_of(backend)
    student, teacher = torch.randn(300, 64, device=device, requires_grad=True), torch.randn(300, 64, device=device)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layersync_loss(student, teacher, backend=backend)
    extra = sum(nbytes for pointer, nbytes in saved.items() if pointer not in (student.data_ptr(), teacher.data_ptr()))
    assert 0 < extra <= 16 * 300


CALLS = {"layersync_loss": lambda x, backend: layersync_loss(x, x.detach().flip(1), backend=backend)}


def raw_samples(backend):
    """Arguments of every raw op, for test_registry.py."""
    device = device_of(backend)
    student, teacher = torch.randn(2, 3, 40, device=device), torch.randn(2, 3, 40, device=device).bfloat16()
    for weight, reduction in itertools.product((None, torch.rand(6, device=device)), op.REDUCTIONS.values()):
        yield "cosine_alignment_forward", (student, teacher, weight, 1e-6, reduction)
        loss, stats, scale = op.FORWARD[backend](student, teacher, weight, 1e-6, reduction)
        for wanted in ((True, False), (False, True), (True, True)):
            yield (
                "cosine_alignment_backward",
                (torch.ones_like(loss), student, teacher, weight, stats, scale, *wanted),
            )
        if backend in op.IN_PLACE:
            gradient = torch.ones_like(loss)
            yield "cosine_alignment_in_place", (student, teacher, weight, gradient, 1e-6, 0.5, reduction, True)
            yield "cosine_alignment_in_place", (student, teacher, weight, gradient, 1e-6, 0.5, reduction, False)


@pytest.mark.parametrize("backend", [backend for backend in FUSED if backend.values != ("triton",)])
def test_raw_ops_refuse_inputs_that_the_edge_would_have_caught(backend):
    """The Triton launcher alone trusts the Python edge."""
    device = device_of(backend)
    student = torch.randn(3, 40, device=device)
    for teacher, weight, match in (
        (torch.randn(4, 40, device=device), None, "dimension 0: 3 and 4"),
        (torch.randn(40, device=device), None, "student has 2"),
        (student, torch.ones(2, device=device), "for each of the 3"),
        (student.long(), None, "takes float32"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op.FORWARD[backend](student, teacher, weight, 1e-6, 1)


@pytest.mark.parametrize("backend", FUSED)
def test_fullgraph_compile_equals_eager_and_does_not_recompile(backend):
    device = device_of(backend)
    torch._dynamo.reset()

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=True)
    def step(student, teacher, mask):
        return layersync_loss(2 * student, teacher, mask=mask, backend=backend)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 3), (4, 5), (6, 7)):
            student = torch.randn(batch, tokens, 40, device=device, requires_grad=True)
            teacher, mask = (
                torch.randn(batch, tokens, 40, device=device),
                torch.rand(batch, tokens, device=device) > 0.5,
            )
            compiled = step(student, teacher, mask)
            eager = layersync_loss(2 * student, teacher, mask=mask, backend=backend)
            torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
            for a, e in zip(torch.autograd.grad(compiled, student), torch.autograd.grad(eager, student), strict=True):
                assert torch.equal(a, e)


def test_inductor_keeps_the_op_and_its_numbers():
    torch._dynamo.reset()
    student, teacher = torch.randn(8, 16, 64, requires_grad=True), torch.randn(8, 16, 64)
    compiled = torch.compile(lambda s, t: layersync_loss(s * 2 + 1, t), fullgraph=True)(student, teacher)
    eager = layersync_loss(student * 2 + 1, teacher)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, student), torch.autograd.grad(eager, student))


@pytest.mark.parametrize("backend", ALL)
def test_autocast_leaves_the_loss_in_fp32(backend):
    device = device_of(backend)
    x = torch.randn(4, 8, 32, device=device, requires_grad=True)
    layer = torch.nn.Linear(32, 32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        student, teacher = layer(x), x
        loss = layersync_loss(student, teacher, backend=backend)
    assert (student.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    outside = layersync_loss(student, teacher, backend=backend)
    assert torch.equal(loss, outside)
    loss.backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", ALL)
def test_functional_gradient(backend):
    device = device_of(backend)
    student, teacher = torch.randn(4, 40, device=device), torch.randn(4, 40, device=device)
    gradient, value = torch.func.grad_and_value(lambda s: layersync_loss(s, teacher, backend=backend))(student)
    expected_value, expected = run(student, teacher, backend)
    assert torch.equal(value, expected_value)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(backend, use_reentrant):
    device = device_of(backend)
    layer = torch.nn.Linear(40, 40, device=device)
    x = torch.randn(4, 40, device=device, requires_grad=True)

    def block(x):
        return layersync_loss(layer(x), x, backend=backend)

    block(x).backward()
    expected, layer.weight.grad = layer.weight.grad, None
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=use_reentrant).backward()
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize("backend", FUSED)
def test_second_derivatives_are_an_error(backend):
    """torch's once_differentiable lets these through, and the result would miss half of its terms."""
    student = torch.randn(4, 40, device=device_of(backend), requires_grad=True)
    loss = layersync_loss(student, torch.randn_like(student), backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_second_derivatives_through_the_reference():
    student = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda s, t: layersync_loss(s, t, teacher_grad=True), (student, teacher))


def test_fp64_runs_through_the_reference():
    student = torch.randn(4, 40, dtype=torch.float64)
    assert layersync_loss(student, student).dtype == torch.float64
    assert layersync_loss(student.float(), student).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"float64 runs through the reference only"):
        layersync_loss(student, student, backend="cpp")


@pytest.mark.parametrize("isa", LOWER_INSTRUCTION_SETS)
def test_lower_instruction_sets_pass_the_same_tests(isa):
    run_on_lower_instruction_set(isa, __file__, "cpp and not instruction")


class Launches(TorchDispatchMode):
    """Notes the ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_call_is_one_op_each_way():
    student, teacher = torch.randn(1, 2, 8, requires_grad=True), torch.randn(1, 2, 8)
    backend = dispatch.resolve("layersync_loss", "auto", "cpu", torch.float32)
    if backend == "reference":
        pytest.skip("no compiled extension")
    with Launches() as forward:
        loss = layersync_loss(student, teacher)
    with Launches() as backward:
        loss.backward()
    assert forward.names == [f"layersync_{backend}::cosine_alignment_forward"]
    # the gradient of the loss itself, ours, and what autograd does to put it into `.grad`
    assert [name for name in backward.names if "layersync" in name] == [
        f"layersync_{backend}::cosine_alignment_backward"
    ]
    assert len(backward.names) <= 3


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"teacher": torch.randn(2, 4, 32)}, ValueError, r"\(2, 3, 32\) and \(2, 4, 32\)"),
        ({"teacher": torch.randn(2, 3, 16)}, ValueError, "project to the teacher's width"),
        ({"teacher": torch.ones(2, 3, 32, dtype=torch.long)}, TypeError, "got torch.int64"),
        ({"teacher": torch.ones(2, 3, 32, dtype=torch.float8_e4m3fn)}, TypeError, "got torch.float8_e4m3fn"),
        ({"teacher": torch.ones(2, 3, 32, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
        ({"teacher": [1.0]}, TypeError, "got list"),
        ({"teacher": torch.ones(2, 3, 32, device="meta")}, ValueError, "student is on cpu and teacher on meta"),
        ({"reduction": "avg"}, ValueError, "reduction='avg'"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"eps": float("nan")}, ValueError, "eps must be positive"),
        ({"backend": "gpu"}, ValueError, "expected one of auto, reference, cpp, triton, cuda"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask of shape \(2, 4\) does not broadcast"),
        ({"mask": torch.ones(2, 3, 1, dtype=torch.bool)}, ValueError, "does not broadcast"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta"),
        ({"token_weight": torch.ones(2, 3, dtype=torch.long)}, TypeError, "token_weight must be floating point"),
        ({"token_weight": torch.ones(2, 3, requires_grad=True)}, ValueError, "token_weight is not differentiated"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(kwargs, error, match):
    arguments = {"student": torch.randn(2, 3, 32), "teacher": torch.randn(2, 3, 32), **kwargs}
    with pytest.raises(error, match=match):
        layersync_loss(arguments.pop("student"), arguments.pop("teacher"), **arguments)


def test_a_mask_that_could_mean_samples_or_tokens_is_refused():
    student = torch.randn(3, 3, 8)
    with pytest.raises(ValueError, match=r"ambiguous.*\(3, 1\).*\(1, 3\)"):
        layersync_loss(student, student, mask=torch.tensor([True, True, False]))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_run_says_why_and_what_could(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from layersync_kernels.ops import dispatch

    with pytest.raises(RuntimeError, match=rf"backend='{backend}' cannot run: .* are on cpu.*Possible here: reference"):
        dispatch.choose("cosine_alignment", backend, "cpu", torch.float32)
