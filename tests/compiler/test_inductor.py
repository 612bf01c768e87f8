"""The pass against eager: other repositories' own lines, compiled; and what must be left alone."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import checkpoint

from layersync_kernels.compiler import inductor
from layersync_kernels.modules.published import SiTBlock
from layersync_kernels.ops import dispatch, native

pytestmark = pytest.mark.skipif(not native.cpp().loaded, reason=f"the C++ extension is {native.cpp().reason}")

ROUNDING = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2e-2, "atol": 1e-3}}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    inductor.disable()


@pytest.fixture
def enabled():
    with inductor.enable():
        yield


def pass_only(graph_module, _inputs):
    """A backend that runs the registered pass as Inductor does, and then the graph as it stands: no code to compile."""
    if config.pre_grad_custom_pass is not None:
        config.pre_grad_custom_pass(graph_module.graph)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def outcome(function, *inputs):
    """Value, gradients of the inputs, and how often the fused op ran forward and backward, compilation aside."""

    def run():
        value = function(*inputs)
        wanted = [x for x in inputs if x.requires_grad]
        if not value.requires_grad:
            return value, [None for x in wanted]
        direction = torch.linspace(1, 2, value.numel()).view_as(value).to(value.dtype)
        return value.detach(), list(torch.autograd.grad(value, wanted, direction, allow_unused=True))

    run()
    with torch.profiler.profile() as profile:
        value, gradients = run()
    ops = [event.name.rpartition("::")[2] for event in profile.events() if event.name.startswith("layersync_")]
    return value, gradients, [ops.count(f"cosine_alignment_{way}") for way in ("forward", "backward")]


def assert_fused(function, *inputs, backend="inductor", calls=(1, 1)):
    expected, gradients, _ = outcome(function, *inputs)
    value, fused_gradients, fused_calls = outcome(torch.compile(function, fullgraph=True, backend=backend), *inputs)
    assert fused_calls == list(calls)
    torch.testing.assert_close([value, *fused_gradients], [expected, *gradients], **ROUNDING[inputs[0].dtype])


def assert_left_alone(function, *inputs):
    expected, gradients, _ = outcome(function, *inputs)
    value, compiled_gradients, calls = outcome(torch.compile(function, fullgraph=True, backend=pass_only), *inputs)
    assert calls == [0, 0]
    torch.testing.assert_close([value, *compiled_gradients], [expected, *gradients])


def tokens(*shape, dtype=torch.float32, grad=True):
    return torch.randn(*(shape or (3, 5, 16))).to(dtype).requires_grad_(grad)


def pair(dtype=torch.float32):
    return tokens(dtype=dtype), tokens(dtype=dtype)


def mean_flat(x):
    return torch.mean(x, dim=list(range(1, len(x.size()))))


# The lines of the published repositories: LayerSync's transport (one pair, several), its LoRA loss, REPA's loop.


def layersync(zs_tilde, gt_zs_tilde):
    z1 = torch.nn.functional.normalize(zs_tilde, dim=-1)
    z2 = torch.nn.functional.normalize(gt_zs_tilde.clone().detach(), dim=-1)
    proj_loss = -(z1 * z2).sum(dim=-1)
    return proj_loss.mean()


def layersync_pairs(*all_reps):
    proj_loss = 0
    for b in [(1, 3), (2, 3)]:
        z1 = torch.nn.functional.normalize(all_reps[b[0] - 1], dim=-1)
        z2 = torch.nn.functional.normalize(all_reps[b[1] - 1].clone().detach(), dim=-1)
        proj_loss -= (z1 * z2).sum(dim=-1)
    return mean_flat(proj_loss)


def layersync_lora(zs, zs_gt):
    zs_normalized = torch.nn.functional.normalize(zs, dim=-1)
    zs_gt_normalized = torch.nn.functional.normalize(zs_gt, dim=-1)
    return -(zs_normalized * zs_gt_normalized).sum(dim=-1).mean()


def repa(zs_tilde, zs):
    proj_loss = 0.0
    for z_j, z_tilde_j in zip(zs, zs_tilde, strict=True):
        z_tilde_j = torch.nn.functional.normalize(z_tilde_j, dim=-1)
        z_j = torch.nn.functional.normalize(z_j, dim=-1)
        proj_loss += mean_flat(-(z_j * z_tilde_j).sum(dim=-1))
    return proj_loss / zs.shape[0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_published_layersync_lines(enabled, dtype, device):
    assert_fused(layersync, *(x.detach().to(device).requires_grad_() for x in pair(dtype)))


@pytest.mark.parametrize(
    ("function", "inputs", "formulas"),
    [(layersync_pairs, 3, 2), (layersync_lora, 2, 1), (repa, 2, 3)],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_other_published_lines(enabled, function, inputs, formulas):
    assert_fused(function, *(tokens() for _ in range(inputs)), backend=pass_only, calls=(formulas, formulas))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: F.cosine_similarity(a, b, dim=-1).mean(),
        lambda a, b: 1 - F.cosine_similarity(a, b, 2),
        lambda a, b: nn.CosineSimilarity(dim=-1, eps=1e-6)(a, b.detach()),
        lambda a, b: (F.normalize(a, dim=2) * F.normalize(b, 2.0, -1)).sum(-1, keepdim=True),
        lambda a, b: torch.sum(torch.mul(F.normalize(a, dim=-1), F.normalize(b, dim=-1)), [-1]),
        lambda a, b: F.normalize(a.detach(), dim=-1).mul(F.normalize(b, dim=-1)).sum(2),
        lambda a, b: layersync_lora(a[:, 1:], b.transpose(0, 1)[1:].transpose(0, 1)),
        lambda a, b: layersync_lora(a, a),
    ],
    ids=["mean", "distance", "module", "keepdim", "functions", "methods", "slices", "with itself"],
)
def test_other_ways_to_write_it(enabled, function):
    assert_fused(function, *pair(), backend=pass_only)


def detached(a, b):
    return layersync_lora(a.detach(), b.detach()) + 0 * a.sum()


def teacher_without_grad(a, b):
    with torch.no_grad():
        teacher = F.normalize(b, dim=-1)
    return (F.normalize(a, dim=-1) * teacher).sum(dim=-1)


def student_without_grad(a, b):
    with torch.no_grad():
        student = F.normalize(a, dim=-1)
    return (student * F.normalize(b, dim=-1)).sum(dim=-1)


def product_without_grad(a, b):
    first, second = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    with torch.no_grad():
        product = first * second
    return product.sum(dim=-1) + a.sum()


@pytest.mark.parametrize(
    ("function", "backward"),
    [(detached, 0), (teacher_without_grad, 1), (student_without_grad, 1), (product_without_grad, 0)],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_only_differentiated_sides_get_a_gradient(enabled, function, backward):
    assert_fused(function, *pair(), backend=pass_only, calls=(1, backward))


def test_inference(enabled):
    a, b = tokens(grad=False), tokens(grad=False)
    with torch.inference_mode():
        assert_fused(layersync, a, b, backend=pass_only, calls=(1, 0))


def upcast(a, b):
    return layersync_lora(a.float(), b.to(torch.float32).detach())


def test_halves_are_read_without_an_upcast(enabled):
    inputs = pair(torch.bfloat16)
    assert_fused(upcast, *inputs, backend=pass_only)
    graphs = []

    def keep(graph_module, _inputs):
        graphs.append(pass_only(graph_module, _inputs))
        return graph_module

    torch.compile(upcast, fullgraph=True, backend=keep)(*inputs)
    (fused,) = (node for node in graphs[0].graph.nodes if node.target is inductor._cosine)
    assert all(node.op == "placeholder" for node in fused.args[:2])


def hooked(a, b):
    copy = a.clone()
    copy.register_hook(lambda grad: 3 * grad)
    return layersync(copy, b)


def narrowed(a, b):
    return layersync(a, (1e-7 * b).to(torch.float16).float())  # one or two bits are left


@pytest.mark.parametrize("function", [hooked, narrowed])
@pytest.mark.parametrize("compiled_autograd", [False, True])  # another way to put a hook into the graph
def test_copies_that_matter_are_kept(enabled, function, compiled_autograd):
    with torch._dynamo.config.patch(compiled_autograd=compiled_autograd):
        assert_fused(function, *pair(), backend=pass_only)


def test_autocast(enabled):
    weight = torch.randn(16, 16) / 4

    def function(a, b):
        with torch.autocast("cpu", torch.bfloat16):
            return layersync_lora(a @ weight, b @ weight), F.cosine_similarity(a @ weight, b, dim=-1)

    a, b = pair()
    expected, fused = function(a, b), torch.compile(function, fullgraph=True, backend=pass_only)(a, b)
    assert [x.dtype for x in fused] == [x.dtype for x in expected]
    torch.testing.assert_close(fused, expected, rtol=2e-2, atol=1e-2)


def changed_between(a, b):
    b = b.detach() * 1
    teacher = F.normalize(b, dim=-1)
    b.mul_(-1)
    return (F.normalize(a, dim=-1) * teacher).sum(dim=-1)


def changed_after_the_copy(a, b):
    b = b * 1
    copy = b.clone()
    b.zero_()
    return layersync(a, copy) + b.sum()


def test_change_of_a_copied_tensor(enabled):
    assert_fused(changed_after_the_copy, *pair(), backend=pass_only)


def uses_normalised_tokens(a, b):
    first = F.normalize(a, dim=-1)
    return (first * F.normalize(b, dim=-1)).sum(dim=-1) + first[..., 0]


def uses_product(a, b):
    product = F.normalize(a, dim=-1) * F.normalize(b, dim=-1)
    return product.sum(dim=-1) + product[..., 0]


@torch.no_grad()
def out_of_sum(a, b):
    return torch.sum(F.normalize(a, dim=-1) * F.normalize(b, dim=-1), -1, out=torch.empty(3, 5))


@torch.no_grad()
def out_of_normalize(a, b):
    return (F.normalize(a, dim=-1, out=torch.empty(3, 5, 16)) * F.normalize(b, dim=-1)).sum(dim=-1)


LEFT_ALONE = {
    "normalised used": uses_normalised_tokens,
    "product used": uses_product,
    "changed": changed_between,
    "dim 1": lambda a, b: (F.normalize(a) * F.normalize(b)).sum(dim=-1),
    "sum over tokens": lambda a, b: (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(dim=1),
    "sum over all": lambda a, b: (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(),
    "one over dim 1": lambda a, b: (F.normalize(a, dim=-1) * F.normalize(b, dim=1)).sum(dim=-1),
    "broadcast": lambda a, b: (F.normalize(a, dim=-1) * F.normalize(b[:, :1], dim=-1)).sum(dim=-1),
    "p=1": lambda a, b: (F.normalize(a, p=1, dim=-1) * F.normalize(b, dim=-1)).sum(dim=-1),
    "eps": lambda a, b: (F.normalize(a, dim=-1, eps=3.0) * F.normalize(b, dim=-1, eps=3.0)).sum(dim=-1),
    "two eps": lambda a, b: (F.normalize(a, dim=-1, eps=1e-8) * F.normalize(b, dim=-1)).sum(dim=-1),
    "square": lambda a, b: (lambda unit: (unit * unit).sum(dim=-1))(F.normalize(a, dim=-1)) + b.sum(),
    "scalars": lambda a, b: (F.normalize(a[0, 0, 0], dim=-1) * F.normalize(b[0, 0, 0], dim=-1)).sum(dim=-1),
    "keyword": lambda a, b: F.normalize(a, dim=-1).mul(other=F.normalize(b, dim=-1)).sum(dim=-1),
    "fp64 sum": lambda a, b: (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(dim=-1, dtype=torch.float64),
    "out": out_of_sum,
    "out of normalize": out_of_normalize,
    "one side": lambda a, b: (F.normalize(a, dim=-1) * b).sum(dim=-1),
    "factor": lambda a, b: (F.normalize(a, dim=-1) * 2).sum(dim=-1),
    "similarity dim 1": lambda a, b: F.cosine_similarity(a, b),
    "similarity broadcast": lambda a, b: F.cosine_similarity(a, b[:, :1], dim=-1),
    "similarity eps": lambda a, b: F.cosine_similarity(a, b, dim=-1, eps=3.0),
    "fp64": lambda a, b: F.cosine_similarity(a.double(), b, dim=-1),
    "vmap": torch.vmap(lambda a, b: F.cosine_similarity(a, b, dim=-1)),
}


@pytest.mark.parametrize("function", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_left_alone(enabled, function):
    assert_left_alone(function, *pair())


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_left_alone_where_no_fused_backend_runs(enabled, monkeypatch, caplog, backend):
    caplog.set_level(logging.INFO, inductor.__name__)
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_environment_backend", backend)
    assert_left_alone(layersync, *pair())
    assert not caplog.records


class Model(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(SiTBlock(width, num_heads=2) for _ in range(2))

    def forward(self, x, c):
        x, reps = self.embed(x), []
        for block in self.blocks:
            x = block(x, c)
            reps.append(x)
        return self.head(x), *reps


def test_training_step_of_a_transformer(enabled):
    model = Model()
    x, c, target = torch.randn(2, 9, 4), torch.randn(2, 32), torch.randn(2, 9, 4)

    def step(*_parameters):
        output, zs_tilde, gt_zs_tilde = model(x, c)
        return mean_flat((output - target) ** 2).mean() + 0.2 * layersync(zs_tilde, gt_zs_tilde)

    assert_fused(step, *model.parameters())


def test_checkpoint(enabled):
    assert_fused(lambda a, b: checkpoint(layersync, a, b, use_reentrant=False), *pair(), calls=(2, 1))


def test_batch_sizes_recompile_no_more_than_without(enabled):
    counts = []
    for backend in ("inductor", "eager"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(layersync, fullgraph=True, backend=counter)
        for batch in (2, 3, 5, 7):
            a, b = tokens(batch, 5, 16), tokens(batch, 5, 16)
            torch.testing.assert_close(compiled(a, b), layersync(a, b))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def fused_calls(function=layersync):
    torch._dynamo.reset()
    return outcome(torch.compile(function, backend=pass_only), *pair())[2][0]


def test_off_by_default_and_after_disable():
    assert fused_calls() == 0
    inductor.enable()
    inductor.enable()
    assert fused_calls() == 1
    inductor.disable()
    assert config.pre_grad_custom_pass is None
    assert fused_calls() == 0
    inductor.disable()


def test_inner_context_leaves_the_outer_one_on():
    with inductor.enable():
        with inductor.enable():
            pass
        assert fused_calls() == 1
    assert fused_calls() == 0


class Recorder(CustomGraphPass):
    def __init__(self):
        self.seen = []

    def __call__(self, graph):
        self.seen.append([node.target for node in graph.nodes])

    def uuid(self):
        return "recorder"


@pytest.mark.parametrize("form", [lambda recorder: recorder, lambda recorder: [recorder]], ids=["pass", "list"])
def test_an_earlier_pass_runs_and_is_restored(form):
    registered = form(Recorder())
    recorder = registered[0] if isinstance(registered, list) else registered
    with config.patch(pre_grad_custom_pass=registered):
        with inductor.enable():
            assert "recorder" in config.pre_grad_custom_pass.uuid()
            assert fused_calls() == 1
        assert config.pre_grad_custom_pass is registered
    assert F.normalize in recorder.seen[0]


def test_caching_is_off_with_an_earlier_pass_of_no_identity():
    with config.patch(pre_grad_custom_pass=lambda graph: None), inductor.enable():
        assert config.pre_grad_custom_pass.uuid() is None


def test_cache_tells_backends_apart(enabled, monkeypatch):
    with_kernels = config.pre_grad_custom_pass.uuid()
    assert with_kernels == inductor._FuseAlignment(None).uuid()
    chosen = {("layersync_loss", "auto", "cpu", torch.float32, False): "reference"}
    monkeypatch.setattr(dispatch, "_chosen", chosen)
    assert config.pre_grad_custom_pass.uuid() != with_kernels


def test_logs_once_for_each_graph(enabled, caplog):
    caplog.set_level(logging.INFO, inductor.__name__)
    compiled = torch.compile(layersync_pairs, backend=pass_only)
    for _ in range(2):
        compiled(*(tokens() for _ in range(3)))
    (record,) = caplog.records
    assert record.getMessage().count("(3, 5, 16)") == 2
