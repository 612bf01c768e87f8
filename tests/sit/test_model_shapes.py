"""SiT on samples of one to three dimensions, with lengths, other positions and other conditions than classes."""

import dataclasses

import pytest
import torch

from layersync_kernels.losses.layersync import LayerSyncLoss
from layersync_kernels.ops.attention import length_mask
from layersync_kernels.sit.batch import Batch, Condition
from layersync_kernels.sit.config.sampling import SamplingConfig
from layersync_kernels.sit.diffusion.transport import create_transport
from layersync_kernels.sit.models.patches import PatchEmbed, sincos_positions, unpatchify
from layersync_kernels.sit.models.sit import SiT
from layersync_kernels.sit.sampling.draw import draw
from layersync_kernels.sit.training.terms.base import Setting
from layersync_kernels.sit.training.terms.layersync import LayerSyncTerm

TINY = {"in_channels": 3, "hidden_size": 24, "depth": 3, "num_heads": 2, "num_classes": 5}
SHAPES = {
    "1-D": {"input_size": (12,), "patch_size": (3,)},
    "2-D": {"input_size": (4, 6), "patch_size": 2},
    "3-D": {"input_size": (4, 4, 6), "patch_size": (2, 2, 3)},
}
KERNELS = ("fused", "eager")


def filled(**options):
    """A model that is not the identity."""
    torch.manual_seed(0)
    model = SiT(**(TINY | options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(model, size=3):
    condition = Condition(torch.arange(size))
    if model.text_width is not None:
        condition = dataclasses.replace(
            condition, text=torch.randn(size, 4, model.text_width), text_lengths=torch.arange(size) + 1
        )
    return torch.randn(size, *model.spec.shape), torch.linspace(0.1, 0.9, size), condition


@pytest.mark.parametrize("patch", [(3,), (2, 3), (2, 1, 3)])
def test_patches_are_laid_out_where_they_were_cut(patch):
    grid = (4, 3, 2)[: len(patch)]
    x = torch.randn(2, 5, *(n * p for n, p in zip(grid, patch, strict=True)))
    embed = PatchEmbed(patch, 5, 7 * 4)
    tokens = embed(x)
    assert tokens.shape[1] == torch.Size(grid).numel()
    # A projection that copies: each patch's values, channels last, are its token.
    values = 5 * torch.Size(patch).numel()
    copying = PatchEmbed(patch, 5, values)
    with torch.no_grad():
        copying.proj.bias.zero_()
        copying.proj.weight.copy_(torch.eye(values).view(values, 5, *patch))
    cut = copying(x).unflatten(2, (5, *patch)).movedim(2, -1)
    assert torch.equal(unpatchify(cut, grid), x)


@pytest.mark.parametrize("grid", [(7,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("width", [16, 24, 28])
def test_positions_tell_every_token_apart(grid, width):
    positions = sincos_positions(width, grid)
    assert positions.shape == (torch.Size(grid).numel(), width)
    distances = torch.cdist(positions, positions) + torch.eye(len(positions), dtype=positions.dtype)
    assert distances.min() > 1e-2
    torch.testing.assert_close(positions.square().sum(1), torch.full((len(positions),), width / 2, dtype=torch.float64))


def test_positions_of_three_dimensions_divide_the_channels_last_dimension_first():
    positions = sincos_positions(16, (3, 4, 5)).view(3, 4, 5, 16)  # 8 pairs: 3, 3 and 2
    assert torch.equal(positions[0, 0, :, :6], positions[2, 3, :, :6])
    assert torch.equal(positions[0, :, 0, 6:12], positions[2, :, 4, 6:12])
    assert torch.equal(positions[:, 0, 0, 12:], positions[:, 3, 4, 12:])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("positions", ["sincos", "learnt", "rope"])
def test_a_model_for_every_shape(shape, positions, kernels):
    model = filled(**SHAPES[shape], positions=positions, kernels=kernels)
    x, t, condition = inputs(model)
    out = model(x, t, **condition.keywords())
    assert out.shape == x.shape
    assert ("pos_embed" in dict(model.named_parameters())) == (positions != "rope")
    # Positions matter: patches that change places do not just change places in the prediction.
    turned = model(x.flip(2), t, **condition.keywords()).flip(2)
    assert not torch.allclose(out, turned, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition", ["class", "none", "embedding", "cross"])
def test_kernels_agree_under_every_condition(shape, condition):
    options = SHAPES[shape] | {"condition": condition, "text_width": 6 if condition in ("embedding", "cross") else None}
    fused, eager = (filled(**options, kernels=kernels) for kernels in KERNELS)
    assert fused.state_dict().keys() == eager.state_dict().keys()
    x, t, given = inputs(fused)
    lengths = torch.tensor([x.shape[2], 1, x.shape[2] // 2])
    for own in (given, dataclasses.replace(given, lengths=lengths)):
        torch.testing.assert_close(fused(x, t, **own.keywords()), eager(x, t, **own.keywords()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("condition", ["class", "embedding", "cross"])
def test_the_condition_is_heard_and_can_be_left_out(condition, kernels):
    words = {"condition": condition, "text_width": 6} if condition != "class" else {}
    model = filled(**SHAPES["1-D"], **words, kernels=kernels)
    x, t, given = inputs(model)
    told = model(x, t, **given.keywords())
    free = model(x, t, **model.without(given).keywords())
    assert not torch.allclose(told, free, atol=1e-4)
    other = dataclasses.replace(given, labels=given.labels.roll(1), text=None if given.text is None else -given.text)
    assert not torch.allclose(told, model(x, t, **other.keywords()), atol=1e-4)
    assert torch.equal(free, model(x, t, **model.without(other).keywords()))
    if given.text is not None:  # words beyond the text's length are not read
        given.text[0, 1:] = 1e4
        torch.testing.assert_close(model(x, t, **given.keywords())[0], told[0])
    both = Condition.cat([given, model.without(given)])
    guided = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), **both.keywords(), cfg_scale=3.0)
    torch.testing.assert_close(guided[:3], free + 3 * (model(x, t, **given.keywords()) - free), rtol=1e-4, atol=1e-4)


def test_dropped_words_become_the_null_word_while_training():
    model = filled(**SHAPES["1-D"], condition="embedding", text_width=6, class_dropout_prob=1.0)
    x, t, given = inputs(model)
    free = model(x, t, **model.without(given).keywords())
    assert torch.equal(model.train()(x, t, **given.keywords()), free)


def test_unconditional_model_has_no_null_condition():
    model = filled(**SHAPES["1-D"], condition="none")
    assert not model.guidable
    with pytest.raises(ValueError, match="no null condition"):
        model.without(Condition(torch.zeros(2, dtype=torch.long)))
    x, t, _ = inputs(model)
    assert model(x, t).shape == x.shape


# Sizes


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_another_size_than_the_model_was_made_for(positions, kernels):
    model = filled(input_size=(4, 6), positions=positions, kernels=kernels)
    wide = filled(input_size=(6, 8), positions=positions, kernels=kernels)
    x, t, condition = inputs(wide)
    torch.testing.assert_close(model(x, t, **condition.keywords()), wide(x, t, **condition.keywords()))


@pytest.mark.parametrize(
    ("options", "shape"),
    [({}, (3, 5, 6)), ({}, (3, 0, 6)), ({}, (4, 4, 6)), ({}, (3, 4)), ({"positions": "learnt"}, (3, 6, 8))],
)
def test_a_size_that_does_not_fit_is_an_error(options, shape):
    model = filled(input_size=(4, 6), **options)
    with pytest.raises(ValueError, match=r"this model expects \(N, 3, 4, 6\)"):
        model(torch.randn(2, *shape), torch.rand(2), torch.zeros(2, dtype=torch.long))


# Lengths


def ragged(shape):
    """Lengths of three samples, in the model's unit, and how many tokens they are."""
    return {"1-D": ([12, 7, 1], [4, 3, 1]), "2-D": ([4, 3, 1], [6, 6, 3]), "3-D": ([4, 2, 1], [8, 4, 4])}[shape]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_what_lies_beyond_a_length_is_not_there(shape, positions, kernels):
    model = filled(**SHAPES[shape], positions=positions, kernels=kernels)
    x, t, condition = inputs(model)
    lengths, tokens = (torch.tensor(values) for values in ragged(shape))
    assert torch.equal(model.token_lengths(lengths), tokens)
    given = dataclasses.replace(condition, lengths=lengths)
    leaf = x.clone().requires_grad_()
    out = model(leaf, t, **given.keywords())
    (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    noisy = x.clone()
    for i, length in enumerate(lengths.tolist()):
        assert not out[i, :, length:].any()
        assert not gradient[i, :, length:].any()
        noisy[i, :, length:] = float("nan")
    assert torch.equal(model(noisy, t, **given.keywords()), out)
    step = model.patch_size[0]
    for i, length in enumerate(lengths.tolist()):  # a sample alone, up to a whole patch
        whole = -(-length // step) * step
        alone = torch.zeros(1, 3, whole, *x.shape[3:])
        alone[:, :, :length] = x[i : i + 1, :, :length]
        own = model(alone, t[i : i + 1], condition.labels[i : i + 1])
        if positions == "rope" or whole == x.shape[2] or shape == "1-D":
            torch.testing.assert_close(out[i, :, :length], own[0, :, :length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[4, 13], [0, 4], [-1, 4]])
def test_lengths_out_of_range_are_named(lengths):
    model = filled(**SHAPES["1-D"])
    x, t, _ = inputs(model, 2)
    with pytest.raises(ValueError, match=r"lengths run from .*expected 1 to 12"):
        model(x, t, torch.zeros(2, dtype=torch.long), lengths=torch.tensor(lengths))


@pytest.mark.parametrize("kernels", KERNELS)
def test_losses_of_a_padded_batch_are_those_of_its_samples(kernels):
    """Flow loss and LayerSync, values and gradients: the padded batch against the samples one by one."""
    model = filled(**SHAPES["1-D"], kernels=kernels)
    transport = create_transport()
    x, t, condition = inputs(model)
    noise, lengths = torch.randn_like(x), torch.tensor([12, 6, 3])
    given = dataclasses.replace(condition, lengths=lengths)
    term = LayerSyncTerm(LayerSyncLoss([(1, 3)], 0.5), Setting(None, model, None, torch.device("cpu")))
    capture = term.captures(kernels)

    def losses(samples, noise, t, condition):
        inputs = condition.keywords() | {"capture": capture}
        output = transport.training_losses(model, samples, inputs, t=t, x0=noise)
        batch = Batch(samples, condition, torch.arange(len(samples)))
        (present,) = term.targets(batch, 1)
        return output["loss"], term.loss(output["states"], present, 0)

    flow, align = losses(x, noise, t, given)
    together = torch.autograd.grad(flow.mean() + align, list(filter(lambda p: p.requires_grad, model.parameters())))
    total, tokens = 0.0, (lengths // 3).tolist()
    for i, length in enumerate(lengths.tolist()):
        own, its = losses(x[i : i + 1, :, :length], noise[i : i + 1, :, :length], t[i : i + 1], condition[i : i + 1])
        torch.testing.assert_close(flow[i : i + 1], own, rtol=1e-5, atol=1e-6)
        total = total + own.mean() / 3 + its * tokens[i] / sum(tokens)
    torch.testing.assert_close(flow.mean() + align, total, rtol=1e-5, atol=1e-6)
    apart = torch.autograd.grad(total, list(filter(lambda p: p.requires_grad, model.parameters())))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_padding_changes_no_loss(prediction):
    model = filled(**SHAPES["3-D"])
    transport = create_transport(prediction=prediction)
    x, t, condition = inputs(model)
    given = dataclasses.replace(condition, lengths=torch.tensor([4, 3, 1])).keywords()
    noise = torch.randn_like(x)
    expected = transport.training_losses(model, x, given, t=t, x0=noise)["loss"]
    inside = length_mask(given["lengths"], 4).view(3, 1, 4, 1, 1)
    for other in (torch.where(inside, x, 7.0), torch.where(inside, x, -9.0)):
        assert torch.equal(transport.training_losses(model, other, given, t=t, x0=noise)["loss"], expected)


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_samples_end_at_their_lengths(sampler):
    model = filled(**SHAPES["1-D"])
    sampling = SamplingConfig(sampler=sampler, solver="euler", sampling_steps=4, cfg_scale=2.0)
    condition = Condition(torch.tensor([0, 1, 2]), lengths=torch.tensor([12, 5, 3]))
    samples = draw(model, create_transport(), sampling, condition, seed=0)
    for sample, length in zip(samples, (12, 5, 3), strict=True):
        assert not sample[:, length:].any()
        assert sample[:, length - 1].abs().min() > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"input_size": (12,), "patch_size": (3, 3)}, "a patch size for each"),
        ({"input_size": (2, 2, 2, 2)}, "one to three sizes"),
        ({"input_size": (12,), "patch_size": 5}, r"input_size=\(12,\) is not a multiple of patch_size=\(5,\)"),
        ({"positions": "fourier"}, "unknown positions='fourier'"),
        ({"condition": "smell"}, "unknown condition='smell'"),
        ({"condition": "cross"}, "needs text_width"),
        ({"positions": "rope", "num_heads": 12}, "head_width=2"),
    ],
)
def test_bad_arguments_are_explained(options, match):
    with pytest.raises(ValueError, match=match):
        SiT(**(TINY | {"input_size": 8} | options))


@pytest.mark.parametrize(
    ("options", "given", "match"),
    [
        ({}, {}, "give labels y"),
        ({"condition": "cross", "text_width": 6}, {}, r"text is nothing; expected words \(3, L, 6\)"),
        ({"condition": "embedding", "text_width": 6}, {"text": torch.zeros(3, 2, 5)}, r"text is \(3, 2, 5\)"),
    ],
)
def test_a_condition_that_is_missing_is_named(options, given, match):
    model = filled(**SHAPES["1-D"], **options)
    x, t, _ = inputs(model)
    with pytest.raises(ValueError, match=match):
        model(x, t, **given)
