"""dispersive_loss against the published formula in fp64."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from layersync_kernels.functional.dispersive import dispersive_loss
from layersync_kernels.ops.dispersive import dispersive_loss_reference, op

from ..support.backends import assert_as_exact_as, device_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run(loss, hidden, dtype=None, **options):
    hidden = hidden.detach().to(dtype or hidden.dtype).requires_grad_()
    value = loss(hidden, **options)
    return value, *torch.autograd.grad(0.7 * value, hidden)


def check(hidden, **options):
    truth = run(dispersive_loss_reference, hidden, torch.float64, **options)
    baseline = run(dispersive_loss_reference, hidden, torch.promote_types(hidden.dtype, torch.float32), **options)
    actual = run(dispersive_loss, hidden, **options)
    assert actual[0].dtype == torch.promote_types(hidden.dtype, torch.float32)
    assert actual[1].dtype == hidden.dtype
    # The exponent is a difference of squares of the samples less their mean: at most 4·max‖h‖² / (K·τ).
    spread = (hidden.double() - hidden.double().mean(dim=0)).flatten(1).square().mean(dim=1).max().item()
    exponent = max(1.0, 4 * spread / options.get("temperature", 1.0))
    assert_as_exact_as(actual[0], baseline[0], truth[0], terms=exponent)
    assert_as_exact_as(actual[1], baseline[1], truth[1], terms=exponent * truth[1].abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_values_and_gradients(dtype, temperature, poisoned_memory):
    check(torch.randn(6, 5, 130).to(dtype), temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_offset_common_to_all_samples_costs_no_digits(dtype):
    check((torch.randn(6, 5, 130) + 1e3).to(dtype))


def test_widths_beyond_a_chunk(monkeypatch):
    monkeypatch.setitem(op._CHUNK, "cpu", 0)  # 256 columns, the least
    for width in (255, 256, 257, 700):
        check(torch.randn(3, width))


@pytest.mark.parametrize(
    "layout",
    [lambda x: x[:, 1:], lambda x: x.transpose(0, 1), lambda x: x[:1].expand(4, -1, -1), lambda x: x[..., ::2]],
    ids=["without the class token", "batch second", "one sample for all", "every other channel"],
)
def test_any_layout(layout):
    x = torch.randn(5, 4, 12, requires_grad=True)
    dispersive_loss(layout(x)).backward()
    twin = x.detach().clone().requires_grad_()
    dispersive_loss(layout(twin).contiguous()).backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_affinities_of_samples_far_apart():
    """A distance is a difference of large squares: digits may go, but no affinity exceeds 1, that to itself is 1."""
    x = 1e3 * torch.randn(4, 5000)
    assert dispersive_loss(x).item() == pytest.approx(-math.log(4))
    assert op.AFFINITY(x.repeat_interleave(3, dim=0), 0, 1, 1.0).max() == 1


def test_gradcheck_and_functional_gradient():
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: dispersive_loss(x, temperature=0.5), x)
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(dispersive_loss)(x), torch.func.grad(dispersive_loss_reference)(x))


CALLS = {"dispersive_loss": lambda x, backend: dispersive_loss(x)}


def raw_samples(backend):
    """Arguments of every raw op, for test_registry.py."""
    rows = torch.randn(4, 9, device=device_of(backend))
    affinity = op.AFFINITY(rows, 1, 2, 0.5)
    yield "dispersive_affinity", (rows, 1, 2, 0.5)
    yield (
        "dispersive_affinity_grad",
        (torch.tensor(0.5, device=rows.device), rows.bfloat16(), affinity, 1, 2, 0.5),
    )


def test_compiles_once_for_all_batches():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: dispersive_loss(x), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((4, 3, 8), (5, 7, 8), (9, 2, 8)):
            x = torch.randn(shape)
            torch.testing.assert_close(run(compiled, x), run(dispersive_loss, x))


def test_autocast_and_checkpoints_change_nothing():
    x = torch.randn(4, 3, 40)
    expected = run(dispersive_loss, x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(dispersive_loss, x), expected, rtol=0, atol=0)
    again = run(lambda x: checkpoint(dispersive_loss, x, use_reentrant=False), x)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_a_nan_shows():
    x = torch.randn(3, 8)
    x[1, 2] = math.nan
    assert dispersive_loss(x).isnan()


def test_saves_one_small_matrix_beside_its_input():
    saved = []
    x = torch.randn(4, 100, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dispersive_loss(x)
    assert sum(t.nbytes for t in saved if t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()) < 200


@pytest.mark.parametrize("shape", [(1, 3, 4), (0, 3, 4), (3, 0)])
def test_a_batch_with_no_pairs_has_loss_and_gradient_zero(shape):
    value, gradient = run(dispersive_loss, torch.randn(shape))
    assert value == 0
    assert gradient.shape == shape
    assert not gradient.any()


def test_bad_input_is_explained():
    x = torch.randn(3, 4, requires_grad=True)
    for temperature in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive, got"):
            dispersive_loss(x, temperature=temperature)
    with pytest.raises(TypeError, match=r"must be float32, bfloat16, float16 or float64, got torch\.int64"):
        dispersive_loss(x.long())
    with pytest.raises(ValueError, match="got a 0-d tensor"):
        dispersive_loss(x[0, 0])
    with pytest.raises(RuntimeError, match=r"gather needs torch.distributed.init_process_group"):
        dispersive_loss(x, gather="world")
    (gradient,) = torch.autograd.grad(dispersive_loss(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()
