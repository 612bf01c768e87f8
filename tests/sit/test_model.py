"""The SiT model: equal to the published one, capture, guidance, compile, bad input."""

import json
import math
from pathlib import Path

import pytest
import torch

from layersync_kernels.sit import SiT, sit_models

GOLDEN = json.loads((Path(__file__).parent / "golden" / "model.json").read_text(encoding="utf-8"))
TINY = {"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
PUBLISHED = [f"SiT-{size}/{patch}" for size in ("XL", "L", "B", "S") for patch in (2, 4, 8)]


def wave(shape, phase, scale=1.0):
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(0.7 * index + phase)).float().reshape(shape)


def filled(**config):
    """A model in evaluation mode whose every parameter matters (at initialisation the prediction is 0)."""
    model = SiT(**config).eval()
    with torch.no_grad():
        for place, (name, parameter) in enumerate(model.named_parameters()):
            if name != "pos_embed":
                parameter.copy_(wave(parameter.shape, place, 0.3))
    return model


def batch(model, size=4):
    x = wave((size, *model.spec.shape), 0.1)
    return x, torch.linspace(0, 1, size), torch.arange(size) % model.num_classes


def doubled(model, t, size=2):
    """The batch of `forward_with_cfg`: samples and times twice, labels and null labels."""
    x, _, y = batch(model, size)
    return torch.cat([x, x]), torch.tensor(t).repeat(2), torch.cat([y, torch.full_like(y, model.num_classes)])


# ---- equal to the published model


def test_state_dict_is_the_published_one():
    with torch.device("meta"):
        model = sit_models["SiT-S/2"]()
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == GOLDEN["SiT-S/2"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_give_models_of_the_published_size(name):
    with torch.device("meta"):
        model = sit_models[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == GOLDEN["parameters"][name]
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["pos_embed"]


@pytest.mark.parametrize("kernels", ["fused", "eager"])
@pytest.mark.parametrize("golden", GOLDEN["outputs"], ids=["latents", "images"])
def test_outputs_are_the_published_ones(golden, kernels):
    model = filled(**golden["config"], kernels=kernels)
    x, _, _ = batch(model)
    t, y = torch.tensor([0.0, 0.25, 0.6, 1.0]), torch.tensor([0, 4, 2, 5])
    with torch.no_grad():
        forward = model(x, t, y)
        cfg = model.forward_with_cfg(x, t[:2].repeat(2), torch.tensor([1, 3, 5, 5]), 4.0)
    for output, expected in ((forward, golden["forward"]), (cfg, golden["cfg"])):
        assert output.shape == x.shape
        torch.testing.assert_close(output.flatten()[:: golden["stride"]], torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", ["fused", "eager"])
def test_a_seed_gives_the_published_initialisation(kernels):
    torch.manual_seed(0)
    model = SiT(**GOLDEN["outputs"][0]["config"], kernels=kernels)
    for name, expected in GOLDEN["initialisation"].items():
        values = model.get_parameter(name).detach().flatten()
        values = values[:: values.numel() // 4]
        torch.testing.assert_close(
            values, torch.tensor(expected), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n} {m}"
        )


def test_every_block_starts_as_the_identity_and_the_prediction_as_zero():
    model = SiT(**TINY)
    x, t, y = batch(model)
    prediction, states = model(x, t, y, capture=(1, 3))
    assert torch.equal(states[1], states[3])
    assert not prediction.any()


def test_initialize_weights_completes_a_model_built_on_the_meta_device():
    torch.manual_seed(0)
    expected = SiT(**TINY)
    with torch.device("meta"):
        model = SiT(**TINY)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(math.nan)
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    model.initialize_weights()
    x, t, y = batch(model)
    assert model(x, t, y).isfinite().all()
    assert torch.equal(model.pos_embed, expected.pos_embed)


def test_bfloat16_weights_do_not_round_the_time_frequencies():
    model, seen = SiT(**TINY), []
    model.t_embedder.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    t = torch.tensor([0.1, 0.9])
    model.t_embedder(t)
    model.bfloat16().t_embedder(t)
    assert seen[1].dtype is torch.bfloat16
    assert torch.equal(seen[0].bfloat16(), seen[1])


@pytest.mark.parametrize(("name", "size"), [("SiT-P/2", 14), ("SiT-P/4", 28), ("SiT-N/2", 14), ("SiT-Ti/4", 28)])
def test_small_presets_take_digits(name, size):
    model = sit_models[name](input_size=size, in_channels=1, num_classes=10, learn_sigma=False)
    x, t, y = batch(model, 2)
    assert model(x, t, y).shape == (2, 1, size, size)


# ---- labels


def test_training_replaces_labels_by_the_null_label_and_evaluation_does_not():
    model = filled(**TINY, class_dropout_prob=1.0)
    x, t, y = batch(model)
    null = torch.full_like(y, model.num_classes)
    assert not torch.equal(model(x, t, y), model(x, t, null))
    assert torch.equal(model.train()(x, t, y), model(x, t, null))


def test_int32_labels_are_labels():
    model = filled(**TINY)
    x, t, y = batch(model)
    assert torch.equal(model(x, t, y.int()), model(x, t, y))


# ---- capture


def test_capture_returns_the_raw_output_of_the_asked_blocks_only():
    model, outputs = filled(**TINY, kernels="eager"), {}
    x, t, y = batch(model)
    plain = model(x, t, y)
    for number, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda module, inputs, output, n=number: outputs.__setitem__(n, output))
    prediction, states = model(x, t, y, capture=[3, 1])
    assert torch.equal(prediction, plain)
    assert sorted(states) == [1, 3]
    assert all(states[number] is outputs[number] for number in states)
    assert states[1].shape == (4, 16, 32)


def test_captured_states_carry_gradients_to_the_blocks_before_them_only():
    model = filled(**TINY)
    _, states = model(*batch(model), capture=(2,))
    states[2].sum().backward()
    assert all(model.blocks[i].attn.qkv.weight.grad is not None for i in (0, 1))
    assert model.blocks[2].attn.qkv.weight.grad is None


def test_forward_with_capture_compiles_to_one_graph_for_any_batch():
    model = filled(**TINY)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size, recompiles_again in ((3, True), (4, True), (5, False), (7, False)):  # the second size makes it dynamic
        x, t, y = batch(model, size)
        with torch._dynamo.config.patch(error_on_recompile=not recompiles_again):
            prediction, states = compiled(x, t, y, capture=(1, 3))
        expected, expected_states = model(x, t, y, capture=(1, 3))
        torch.testing.assert_close(prediction, expected)
        torch.testing.assert_close(states, expected_states)
    states[1].sum().backward()
    assert model.blocks[0].mlp.fc1.weight.grad.any()


# ---- classifier-free guidance


@pytest.mark.parametrize(("channels", "default"), [(1, 1), (3, 3), (4, 3), (8, 8)])
def test_guidance_extrapolates_the_published_channels(channels, default):
    model = filled(**TINY, in_channels=channels)
    x, t, y = doubled(model, [0.2, 0.7])
    conditional, unconditional = model(x, t, y).chunk(2)
    guided = unconditional + 3.0 * (conditional - unconditional)
    first, second = model.forward_with_cfg(x, t, y, 3.0).chunk(2)
    torch.testing.assert_close(first[:, :default], guided[:, :default])
    torch.testing.assert_close(second[:, :default], guided[:, :default])
    assert torch.equal(first[:, default:], conditional[:, default:])
    assert torch.equal(second[:, default:], unconditional[:, default:])
    every, _ = model.forward_with_cfg(x, t, y, 3.0, cfg_channels=channels).chunk(2)
    torch.testing.assert_close(every, guided)


def test_guidance_reads_the_first_half_of_the_samples():
    model = filled(**TINY)
    x, t, y = doubled(model, [0.2, 0.7])
    other = torch.cat([x[:2], torch.full_like(x[2:], math.nan)])
    assert torch.equal(model.forward_with_cfg(other, t, y, 2.0), model.forward_with_cfg(x, t, y, 2.0))


@pytest.mark.parametrize("compiled", [False, True])
def test_guidance_stops_outside_its_interval(compiled):
    model = filled(**TINY)
    call = model.forward_with_cfg
    if compiled:
        torch.compiler.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    for times, guides in (([0.3, 0.6], [True, True]), ([0.2, 0.7], [False, False]), ([0.1, 0.5], [False, True])):
        x, t, y = doubled(model, times)
        conditional = model(x, t, y).chunk(2)[0].repeat(2, 1, 1, 1)
        guided = model.forward_with_cfg(x, t, y, 3.0)
        expected = torch.where(torch.tensor(guides * 2).view(4, 1, 1, 1), guided, conditional)
        torch.testing.assert_close(call(x, t, y, 3.0, guidance_interval=(0.3, 0.6)), expected)


def test_guidance_outside_its_interval_skips_the_unconditional_half():
    model, sizes = filled(**TINY), []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for time in (0.1, 0.5):
        x, t, y = doubled(model, [time, time])
        model.forward_with_cfg(x, t, y, 3.0, guidance_interval=(0.3, 0.6))
    assert sizes == [2, 4]


# ---- bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 3, 8, 8)}, ValueError, r"x has shape \(4, 3, 8, 8\).*\(N, 4, 8, 8\)"),
        ({"x": torch.zeros(4, 4, 8, 15)}, ValueError, "x has shape"),
        ({"x": torch.zeros(4, 8, 8)}, ValueError, "x has shape"),
        ({"t": torch.zeros(3)}, ValueError, r"t has shape \(3,\).*\(4,\)"),
        ({"t": torch.tensor(0.5)}, ValueError, "t has shape"),
        ({"y": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, r"y \(4, 1\)"),
        ({"y": torch.zeros(4)}, TypeError, "labels y are torch.float32"),
        ({"y": torch.tensor([0, 1, 2, 6])}, ValueError, r"run from 0 to 6; expected 0\.\.5 \(5 is the null label\)"),
        ({"y": torch.tensor([0, 1, 2, -1])}, ValueError, "run from -1 to 2"),
        ({"capture": (0, 1)}, ValueError, "counted from 1 to 3"),
        ({"capture": (4,)}, ValueError, "counted from 1 to 3"),
        ({"capture": 2}, TypeError, "a sequence of block numbers"),
        ({"capture": ("2",)}, TypeError, "a sequence of block numbers"),
        ({"capture": {2: None}}, TypeError, "a sequence of block numbers"),
    ],
)
def test_bad_input_is_named(change, error, message):
    model = SiT(**TINY).eval()
    x, t, y = batch(model)
    with pytest.raises(error, match=message):
        model(**{"x": x, "t": t, "y": y, **change})


def test_the_null_label_is_refused_by_a_model_without_one():
    model = SiT(**TINY, class_dropout_prob=0.0)
    x, t, y = batch(model)
    with pytest.raises(ValueError, match=r"expected 0\.\.4 \(there is no null label\)"):
        model(x, t, y + model.num_classes)
    with pytest.raises(ValueError, match="no null label"):
        model.forward_with_cfg(x, t, y, 2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg_channels": 5}, r"cfg_channels=5; expected 1\.\.4"),
        ({"cfg_channels": 0}, "cfg_channels=0"),
        ({"guidance_interval": (0.8, 0.2)}, "low <= high"),
        ({"x": torch.zeros(3, 4, 8, 8)}, "the batch twice"),
        ({"y": torch.zeros(2, dtype=torch.int64)}, "the batch twice"),
        ({"x": torch.zeros(3, 4, 8, 8), "t": torch.zeros(3), "y": torch.tensor([0, 1, 5])}, "the batch twice"),
    ],
)
def test_bad_guidance_is_named(change, message):
    model = SiT(**TINY)
    x, t, y = doubled(model, [0.1, 0.2])
    with pytest.raises(ValueError, match=message):
        model.forward_with_cfg(**{"x": x, "t": t, "y": y, "cfg_scale": 2.0, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 9}, "input_size=9 is not a multiple of patch_size=2"),
        ({"num_heads": 3}, "hidden_size=32; expected a multiple of 4 and of num_heads=3"),
        ({"hidden_size": 30}, "hidden_size=30"),
        ({"depth": 0}, "depth=0; expected at least 1"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob=1.5"),
    ],
)
def test_impossible_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SiT(**{**TINY, **change})
