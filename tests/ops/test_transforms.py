"""Function transforms over every op: the reference runs under vmap and in forward mode, or one clear error is raised.

The calls are those of each op's own test file: `CALLS`, from each public function to a call with a tensor (2, 4, 8).
"""

import importlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from layersync_kernels import layersync_loss
from layersync_kernels.ops import dispatch, registry

CALLS = {
    name: importlib.import_module(f"{__package__}.test_{op.name}").CALLS[name]
    for op in registry.ops()
    for name in op.functions
}
PLAIN = ["dispersive_loss"]  # has no reference to fall back to
MAPPED = [name for name in CALLS if name not in PLAIN]


def fused(name):
    """The fused backend that the function runs on here by itself, or a skip."""
    backend = dispatch.resolve(name, "auto", "cpu", torch.float32)
    if backend == "reference":
        pytest.skip("no fused backend runs here")
    return backend


def scalar(call):
    return lambda x: call(x).square().sum()


@pytest.fixture
def x():
    return torch.randn(3, 2, 4, 8)


@pytest.mark.parametrize("name", MAPPED)
def test_vmap_gives_what_a_loop_gives(name, x):
    def call(sample):
        return CALLS[name](sample, "auto")

    torch.testing.assert_close(vmap(call)(x), torch.stack([call(sample) for sample in x]))
    gradients = torch.stack([grad(scalar(call))(sample) for sample in x])
    torch.testing.assert_close(vmap(grad(scalar(call)))(x), gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAPPED)
def test_forward_mode_gives_the_derivative_of_the_reference(name, x):
    primal, tangent = x[0].double(), x[1].double()
    _, expected = jvp(lambda x: CALLS[name](x, "reference"), (primal,), (tangent,))
    value, derivative = jvp(lambda x: CALLS[name](x, "auto"), (primal.float(),), (tangent.float(),))
    torch.testing.assert_close(derivative.double(), expected, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(CALLS[name](forward_ad.make_dual(primal.float(), tangent.float()), "auto"))
    assert torch.equal(dual.primal, value)
    assert torch.equal(dual.tangent, derivative)
    step = 1e-6 * tangent
    difference = CALLS[name](primal + step, "reference") - CALLS[name](primal - step, "reference")
    if not name.endswith(("_loss", "_mlp")):  # those have constants made of the same tensor, and kinks
        torch.testing.assert_close(expected, difference / 2e-6, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in CALLS if name != "spatial_norm"])
def test_reverse_mode_transforms_run_on_the_fused_backend(name, x):
    backend = fused(name)

    def call(x):
        return CALLS[name](x, backend)

    (expected,) = torch.autograd.grad(scalar(call)(leaf := x[0].clone().requires_grad_()), leaf)
    torch.testing.assert_close(grad(scalar(call))(x[0]), expected)
    output = call(leaf)
    rows = torch.eye(output.numel()).view(-1, *output.shape)[:5]
    loop = torch.stack([torch.autograd.grad(call(leaf), leaf, row)[0] for row in rows])
    (batched,) = torch.autograd.grad(output, leaf, rows, is_grads_batched=True)
    torch.testing.assert_close(batched, loop)
    torch.testing.assert_close(jacrev(call)(x[0]).reshape(-1, *leaf.shape)[:5], loop)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transform", ["vmap", "jvp", "dual"])
def test_a_fused_backend_says_that_it_knows_nothing_of_a_transform(name, transform, x):
    backend = fused(name)

    def call(x):
        return CALLS[name](x, backend)

    instead = "write the loss in plain PyTorch there" if name in PLAIN else "Possible here: reference"
    what = "torch.func.vmap" if transform == "vmap" else "forward-mode differentiation"

    def dual():
        with forward_ad.dual_level():
            call(forward_ad.make_dual(x[0], x[1]))

    run = {"vmap": lambda: vmap(call)(x), "jvp": lambda: jvp(call, (x[0],), (x[1],)), "dual": dual}[transform]
    with pytest.raises(RuntimeError, match=f"layersync_kernels: .*know nothing of {what}.*{instead}"):
        run()


def test_the_choice_under_a_transform_is_not_remembered(x):
    before = dispatch.resolve("layersync_loss", "auto", "cpu", torch.float32)
    vmap(lambda s: layersync_loss(s, s))(x)
    assert dispatch.resolve("layersync_loss", "auto", "cpu", torch.float32) == before


def test_gradients_per_sample_of_a_model(x):
    """vmap over the gradient with respect to parameters that all samples share, as for clipping or influence."""
    layer = torch.nn.Linear(8, 8)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, sample):
        return layersync_loss(functional_call(layer, parameters, (sample,)), sample)

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index, sample in enumerate(x):
        for name, gradient in grad(loss)(parameters, sample).items():
            torch.testing.assert_close(per_sample[name][index], gradient, rtol=1e-4, atol=1e-6)


def test_vmap_inside_of_a_compiled_graph(x):
    torch._dynamo.reset()

    def step(x):
        return vmap(lambda s: layersync_loss(s, s.flip(0)))(x)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
