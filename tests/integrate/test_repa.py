"""`RepresentationAlignment` on REPA's model, against REPA's own loss."""

import copy

import pytest
import torch
from torch import nn

from layersync_kernels import RepresentationAlignment

from . import standins

pytest.importorskip("timm")


@pytest.fixture
def model():
    return standins.ProjectedSiT(depth=9)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(standins.BATCH, 4, 8, 8, generator=generator)
    return images, {"y": torch.arange(standins.BATCH)}, [torch.randn(standins.BATCH, 16, 12, generator=generator)]


def losses(model, images, labels, zs):
    torch.manual_seed(1)
    flow, projected = standins.repa_loss(model, images, labels, zs)
    return flow.mean(), projected


def test_repas_own_term_with_its_projector_spared(model):
    twin, inputs = copy.deepcopy(model), batch()
    repa, ran = RepresentationAlignment(model, weight=0.5), []
    assert not list(repa.parameters())
    assert set(model.state_dict()) == set(twin.state_dict())
    model.projectors[0][0].register_forward_hook(lambda module, args, output: ran.append(len(output)))
    for step in range(2):
        flow, own = losses(model, *batch(step))
        assert own == 0
        assert ran == [0]  # no tokens
        loss = flow + repa.loss(batch(step)[2])
        ran.clear()
        flow, own = losses(twin, *batch(step))
        expected = flow + 0.5 * own
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(repa.cosine["projectors.0"], -own.detach())
        torch.testing.assert_close(repa.value, 0.5 * own.detach())
        for one, other in zip(gradients(loss, model), gradients(expected, twin), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    losses(model, *inputs)
    with pytest.raises(ValueError, match="2 teachers for 1 projectors"):
        repa.loss(inputs[2] * 2)


def gradients(loss, model):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def test_copies_and_passes_without_grad_are_left_alone(model):
    images, labels, zs = batch()
    expected = losses(model, images, labels, zs)
    repa = RepresentationAlignment(model)
    with pytest.raises(RuntimeError, match=r"projectors\.0 was given nothing"):
        repa.loss(zs)
    with torch.no_grad():
        torch.testing.assert_close(losses(model, images, labels, zs), expected)
    assert repa.loss(zs) == 0
    torch.testing.assert_close(losses(copy.deepcopy(model), images, labels, zs), expected)
    losses(model, images, labels, zs)
    with torch.no_grad():  # an average that is evaluated in between
        losses(model, images, labels, zs)
    torch.testing.assert_close(repa.loss(zs[0]), 0.5 * expected[1])


def test_the_loss_runs_under_the_autocast_of_the_pass(model):
    images, labels, zs = batch()
    repa = RepresentationAlignment(model)
    with torch.autocast("cpu", torch.bfloat16):
        flow, _ = losses(model, images, labels, zs)
    types = []
    body = model.projectors[0][2]
    body.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    (flow + repa.loss(zs)).backward()
    assert types == [torch.bfloat16]


@pytest.mark.parametrize("projectors", [None, nn.ModuleList(), nn.ModuleList([nn.Linear(4, 4)])])
def test_other_models_are_told_what_to_do(projectors):
    model = nn.Module()
    if projectors is not None:
        model.projectors = projectors
    with pytest.raises(ValueError, match=r"Module\.projectors is no list.*RepresentationAlignmentLoss"):
        RepresentationAlignment(model)
