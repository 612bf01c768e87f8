"""The backend "compile": the reference under torch.compile, wherever a call may come from."""

import importlib.util
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

from layersync_kernels import functional, layersync_loss
from layersync_kernels.modules import AdaLNZeroBlock
from layersync_kernels.ops import compiled, dispatch

from ..support.tables import entry, put, table

WIDTH = 16


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    counters.clear()
    yield
    compiled._compiled.cache_clear()


@pytest.fixture
def quickly(monkeypatch):
    """Without Inductor, whose code takes seconds to build: Dynamo decides when to compile."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))


def graphs():
    return counters["stats"]["unique_graphs"]


def seam(name, *rows):
    def call(x, other, backend):
        given = [other if row else other[:, 0] for row in rows]
        results = getattr(functional, name)(x, *given, backend=backend)
        return results if isinstance(results, tuple) else (results,)

    return call


def aligned(x, other, backend):
    student = functional.aligned_residual_norm(x, x, other[:, 0], None, None, tap=True, backend=backend)
    teacher = functional.aligned_residual_norm(
        student.residual, other, other[:, 0], None, None, student=student.tap, backend=backend
    )
    return teacher[:3]


def mlp(x, other, backend):
    weight = other.reshape(-1, WIDTH)
    return functional.gelu_mlp(x, weight, None, weight.t(), None, backend=backend)


def gated_mlp(x, other, backend):
    weight = other.reshape(-1, WIDTH)
    return functional.swiglu_mlp(x, weight, None, weight.t()[:, ::2], None, backend=backend)


FUNCTIONS = {
    "layersync_loss": lambda x, other, backend: layersync_loss(
        x, other, mask=torch.ones(x.shape[:-1]) > 0, backend=backend
    ),
    "modulated_layer_norm": seam("modulated_layer_norm", False, False),
    "modulated_rms_norm": seam("modulated_rms_norm", False, False),
    "gated_residual": seam("gated_residual", True, False),
    "gated_residual_norm": seam("gated_residual_norm", True, False, False, False),
    "aligned_residual_norm": aligned,
    "linear_gelu": lambda x, other, backend: functional.linear_gelu(
        x, other.reshape(-1, WIDTH), other.reshape(-1, WIDTH)[:, 0], backend=backend
    ),
    "gelu_mlp": mlp,
    "qk_norm_rope": lambda x, other, backend: functional.qk_norm_rope(
        torch.cat([x, other, x * other], dim=-1), torch.ones(8), torch.ones(8), None, None, 2, backend=backend
    ),
    "spatial_norm": lambda x, other, backend: functional.spatial_norm(x * other, backend=backend),
    "swiglu": lambda x, other, backend: functional.swiglu(x * other, backend=backend),
    "swiglu_mlp": gated_mlp,
}


def step(call, backend, tokens=3, samples=2, dtype=torch.float32, grad=True, width=WIDTH):
    """The results, and where wanted the gradients, of one call on tokens that depend on the sizes alone."""
    generator = torch.Generator().manual_seed(tokens * 64 + samples)
    given = [torch.randn(samples, tokens, width, generator=generator).to(dtype) for _ in range(2)]
    given = [tensor.requires_grad_(grad) for tensor in given]
    with torch.set_grad_enabled(grad):
        results = call(*given, backend)
        results = results if isinstance(results, tuple) else (results,)
        if not grad:
            return list(results)
        total = sum((result.float() * (i + 1)).square().sum() for i, result in enumerate(results))
        gradients = torch.autograd.grad(total, given, allow_unused=True)
    return [*(result.detach() for result in results), *(g for g in gradients if g is not None)]


def test_every_function_of_an_op_with_this_backend_is_tried():
    offered = {name for op in dispatch.registry.ops() if op.uncompiled is None for name in op.functions}
    assert offered == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_and_gradients_are_those_of_the_reference(name, quickly):
    for grad in (True, False):
        expected, found = (step(FUNCTIONS[name], backend, grad=grad) for backend in ("reference", "compile"))
        assert graphs() > 0
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_sizes_that_vary_cost_one_more_compilation_and_a_width_its_own(quickly):
    counted = []
    for width in (8, 24):
        for grad in (True, False):
            for dtype in (torch.float32, torch.bfloat16):
                before = graphs()
                for tokens, samples in ((3, 2), (4, 3), (5, 4), (3, 8), (9, 2)):
                    step(FUNCTIONS["layersync_loss"], "compile", tokens, samples, dtype, grad, width)
                counted.append(graphs() - before)
    assert counted == 4 * [2, 1]  # the second dtype finds the sizes symbolic


def test_a_call_within_a_compiled_function_becomes_part_of_it(quickly):
    def whole(x, other):
        return layersync_loss(x, other, backend="compile") + layersync_loss(x, other, backend="compile")

    given = [torch.randn(4, WIDTH) for _ in range(2)]
    found = torch._dynamo.optimize("eager", nopython=True)(whole)(*given)
    assert graphs() == 1
    torch.testing.assert_close(found, 2 * layersync_loss(*given, backend="reference"))


def test_under_other_transforms_it_is_the_reference():
    given = [torch.randn(2, 4, WIDTH) for _ in range(2)]
    expected = layersync_loss(*given, backend="reference")

    def call(x, other):
        return layersync_loss(x, other, backend="compile")

    torch.testing.assert_close(make_fx(call)(*given)(*given), expected)
    grad = torch.func.grad(call)(*given)
    leaf = given[0].clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(layersync_loss(leaf, given[1], backend="reference"), leaf)[0])
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert call(torch.empty(4, WIDTH), torch.empty(4, WIDTH)).shape == ()
    assert graphs() == 0
    with pytest.raises(RuntimeError, match=r"layersync_loss: backend='compile' cannot run: .*torch\.func\.vmap"):
        torch.func.vmap(call)(*given)


def test_nothing_is_compiled_by_rule():
    for op in dispatch.registry.ops():
        for device in ("cpu", "cuda"):
            assert dispatch.rule(op.name, device, torch.float32).backend != "compile"


@pytest.mark.parametrize("name", ["self_attention", "gram_alignment_loss", "projected_alignment_loss", "dispersive"])
def test_an_op_without_it_says_why(name, monkeypatch):
    with pytest.raises(RuntimeError, match="has no compiled reference: it"):
        dispatch.choose(name, "compile", "cpu", torch.float32)
    monkeypatch.setattr(dispatch, "_environment_backend", "compile")
    choice = dispatch.choose(name, "auto", "cpu", torch.float32)
    assert choice.backend == dispatch.choose(name, "auto", "cpu", torch.float32).backend != "compile"
    assert dispatch.choose("layersync_loss", "auto", "cpu", torch.float32).backend == "compile"


def test_a_machine_on_which_it_cannot_work_says_why(monkeypatch):
    def obstacle(device):
        with pytest.raises(RuntimeError) as error:
            dispatch.choose("layersync_loss", "compile", device, torch.float32)
        return str(error.value)

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "torch.compile needs a C++ compiler on the CPU, and there is no" in obstacle("cpu")
    monkeypatch.setenv("CXX", "nowhere/c++ -O2")
    assert "there is no nowhere/c++ -O2" in obstacle("cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "torch.compile needs Triton on a GPU, and triton is not installed" in obstacle("cuda")
    assert "the tensors are on mps" in obstacle("mps")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert "switched off by TORCH_COMPILE_DISABLE=1" in obstacle("cpu")
    with pytest.raises(RuntimeError, match="float64 runs through the reference only"):
        dispatch.choose("layersync_loss", "compile", "cpu", torch.float64)


class Model(nn.Module):
    """Two blocks, with the alignment of the first to the second."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(AdaLNZeroBlock(32, 2) for _ in range(2))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.05)

    def forward(self, x, condition):
        first = self.blocks[0](x, condition)
        second = self.blocks[1](first, condition)
        return second.square().mean() + layersync_loss(first, second)


def train(steps=3):
    torch.manual_seed(0)
    model = Model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(2, 6, 32), torch.randn(2, 32))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses), torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# By Inductor, the other one without: each function takes it seconds.
@pytest.mark.parametrize(
    ("functions", "inductor"),
    [
        (("layersync_loss",), True),
        (("layersync_loss", "modulated_layer_norm", "gated_residual_norm", "gated_residual", "gelu_mlp"), False),
    ],
    ids=["inductor", "all"],
)
def test_a_model_trains_alike_by_a_table_that_names_it(functions, inductor, monkeypatch, tmp_path, request):
    obstacle = compiled.obstacle("cpu", triton=False)
    if inductor and obstacle is not None:
        pytest.skip(obstacle)
    if not inductor:
        request.getfixturevalue("quickly")
    monkeypatch.setattr(dispatch, "_environment_backend", "auto")
    put(monkeypatch, tmp_path / "off.json", table())
    expected = train()
    assert graphs() == 0
    put(monkeypatch, tmp_path / "table.json", table(*(entry(name, choice="compile") for name in functions)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        found = train()
    assert graphs() >= len(functions)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    monkeypatch.undo()
    dispatch.reset()
