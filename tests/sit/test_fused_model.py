"""The SiT on fused kernels against the one in plain PyTorch: numbers, training, capture, compile, wrappers."""

import copy
import functools

import pytest
import torch
from torch import nn

from layersync_kernels import LayerSyncLoss, layersync_loss
from layersync_kernels.sit import SiT

MODERN = {"norm": "rms", "qk_norm": True, "mlp": "swiglu"}
TINY = {"input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


def filled(kernels, block=None, **options):
    """A model whose every block matters (at initialisation each is the identity); equal for equal seeds.

    `block` are options of the block that the model has none for.
    """
    torch.manual_seed(0)
    model = SiT(**{**TINY, **options}, kernels=kernels)
    if block is not None:
        kind, width, heads = type(model.blocks[0]), TINY["hidden_size"], TINY["num_heads"]
        model.blocks = nn.ModuleList(kind(width, heads, **block) for _ in model.blocks)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "final_layer" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch(size=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, 8, 8, generator=generator)
    return x, torch.rand(size, generator=generator), torch.arange(size) % 5


def eager_alignment(model, pairs, inputs):
    """Prediction and cosine of each pair by the formula on captured states."""
    prediction, states = model(*inputs, capture=sorted({block for pair in pairs for block in pair}))
    return prediction, {pair: -layersync_loss(states[pair[0]], states[pair[1]], reduction="none",
                                              backend="reference") for pair in pairs}  # fmt: skip


def gradients(model, prediction, cosines):
    model.zero_grad()
    loss = prediction.square().mean() - sum((i + 1) * cosine.mean() for i, cosine in enumerate(cosines.values()))
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_seed_gives_equal_models():
    torch.manual_seed(0)
    fused = SiT(**TINY).state_dict()
    torch.manual_seed(0)
    eager = SiT(**TINY, kernels="eager").state_dict()
    assert list(fused) == list(eager)
    for name, parameter in fused.items():
        assert torch.equal(parameter, eager[name])


PAIRS = {
    "none": [],
    "one": [(1, 3)],
    "neighbours": [(1, 2)],
    "teacher is the last block": [(2, 4)],
    "two apart": [(1, 2), (3, 4)],
    "two crossed": [(1, 3), (2, 4)],
    "student and teacher": [(1, 2), (2, 4)],
    "nested": [(2, 3), (1, 4)],
}


@pytest.mark.parametrize("recompute", ["none", "light", "full"])
@pytest.mark.parametrize("pairs", PAIRS)
def test_prediction_cosines_and_gradients_are_those_of_the_eager_model(pairs, recompute):
    pairs, inputs = PAIRS[pairs], batch()
    fused, eager = filled("fused", recompute=recompute).eval(), filled("eager").eval()
    output = fused(*inputs, capture=pairs)
    prediction, cosines = output if pairs else (output, {})
    expected, expected_cosines = eager_alignment(eager, pairs, inputs) if pairs else (eager(*inputs), {})
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
    assert list(cosines) == sorted(pairs, key=lambda pair: pair[1])
    for pair, cosine in cosines.items():
        assert cosine.dtype == torch.float32
        torch.testing.assert_close(cosine, expected_cosines[pair], rtol=1e-4, atol=1e-5)
    expected_cosines = {pair: expected_cosines[pair] for pair in cosines}
    actual, truth = gradients(fused, prediction, cosines), gradients(eager, expected, expected_cosines)
    assert actual.keys() == truth.keys()
    for name, gradient in actual.items():
        error = (gradient - truth[name]).norm() / truth[name].norm()
        assert error < 1e-4, f"{name}: {error:.2g}"


def test_numbers_and_pairs_are_captured_together():
    fused, eager, inputs = filled("fused").eval(), filled("eager").eval(), batch()
    prediction, states = fused(*inputs, capture=(4, (1, 3), 1))
    expected, expected_states = eager(*inputs, capture=(1, 4))
    assert set(states) == {1, 4, (1, 3)}
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
    for number, state in expected_states.items():
        torch.testing.assert_close(states[number], state, rtol=1e-4, atol=1e-5)
    (states[1].square().mean() + states[4].mean() - states[1, 3].mean()).backward()
    (expected_states[1].square().mean() + expected_states[4].mean()).backward()
    assert all(p.grad.isfinite().all() for p in fused.blocks.parameters())


def test_capture_changes_no_prediction():
    model, inputs = filled("fused").eval(), batch()
    plain = model(*inputs)
    for capture in ((1, 4), ((1, 3),), ((2, 4), 3)):
        assert torch.equal(model(*inputs, capture=capture)[0], plain)


def test_the_loss_module_takes_pairs_and_numbers_alike():
    model, inputs = filled("fused").eval(), batch()
    loss = LayerSyncLoss([(1, 3), (1, 4), (2, 4)], [0.1, 0.2, 0.3])  # block 1 is a student twice
    assert loss.captures == ((1, 3), (2, 4), 1, 4)
    values = [loss(model(*inputs, capture=capture)[1]) for capture in (loss.captures, loss.layers)]
    torch.testing.assert_close(*values)


def train(kernels, *, autocast=None, perturbed=0, steps=50, **options):
    """The loss in each step of AdamW; `perturbed` models start an ulp from the others, by different signs each."""
    model = filled(kernels, **options).train()
    ulp = torch.finfo(autocast or torch.float32).eps
    if perturbed:
        generator = torch.Generator().manual_seed(perturbed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + ulp * (torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data, _, labels = batch(8)
    torch.manual_seed(2)  # labels that are dropped
    curve = []
    for step in range(steps):
        noise, t, _ = batch(8, seed=100 + step)
        wide = t.view(-1, 1, 1, 1)
        inputs = ((1 - wide) * noise + wide * data, t, labels)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            if kernels == "fused":
                prediction, states = model(*inputs, capture=[(1, 3)])
                cosine = states[1, 3].mean()
            else:
                prediction, cosines = eager_alignment(model, [(1, 3)], inputs)
                cosine = cosines[1, 3].mean()
            loss = (prediction.float() - (data - noise)).square().mean() - 0.5 * cosine
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64)


@pytest.mark.parametrize(
    ("autocast", "options"),
    [(None, {}), (torch.bfloat16, {}), (None, {"positions": "rope", "block": MODERN})],
    ids=["fp32", "bf16", "lightning-fp32"],
)
def test_training_takes_the_course_of_the_eager_model(autocast, options):
    """No two float programs agree over 50 steps: the yardstick is how far eager runs part that start an ulp apart."""
    course = functools.partial(train, autocast=autocast, **options)
    eager = course("eager")
    apart = max((course("eager", perturbed=n) - eager).abs().max().item() for n in (1, 2, 3))
    distance = (course("fused") - eager).abs().max().item()
    assert distance <= 3 * apart, f"{distance:.3g} from eager, eager runs {apart:.3g} apart"
    assert apart < 0.02 * (eager[0] - eager[-1])  # else this would say nothing
    assert eager[-1] < eager[0]


def loss_of(model, x, t, y):
    prediction, states = model(x, t, y, capture=((1, 2), (2, 3)))
    return prediction.square().mean() - states[1, 2].mean() - states[2, 3].mean()


def test_model_and_loss_compile_to_one_graph_that_serves_every_batch():
    torch.compiler.reset()
    model = filled("fused", depth=3).eval()
    compiled = torch.compile(functools.partial(loss_of, model), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (2, 5):
            results = []
            for call in (compiled, functools.partial(loss_of, model)):
                model.zero_grad()
                loss = call(*batch(size))
                loss.backward()
                results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
            for a, e in zip(*results, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_a_marked_batch_dimension_does_not_recompile():
    torch.compiler.reset()
    model = filled("fused", depth=2).eval()
    compiled = torch.compile(
        lambda x, t, y: model(x, t, y, capture=((1, 2),))[1][1, 2].mean(), fullgraph=True, backend="aot_eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (2, 3):
            inputs = batch(size)
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 0)
            compiled(*inputs).backward()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_blocks_train_as_eager_ones(recompute):
    """What the trainer does: each block is compiled for itself, and taps cross their borders."""
    torch.compiler.reset()
    inputs = batch()
    results = []
    for compiled in (False, True):
        model = filled("fused", depth=3, recompute=recompute).eval()
        if compiled:
            for block in model.blocks:
                block.compile(backend="aot_eager")
        loss_of(model, *inputs).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_a_copy_is_a_model_of_its_own():
    model, inputs = filled("fused").eval(), batch()
    loss_of(model, *inputs).backward()
    ema = copy.deepcopy(model).requires_grad_(False)
    expected = model(*inputs, capture=((1, 3),))
    torch.testing.assert_close(ema(*inputs, capture=((1, 3),)), expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(ema(*inputs), expected[0])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_data_parallel_on_one_process_gives_the_same_gradients(tmp_path):
    model, inputs = filled("fused").eval(), batch()
    expected = gradients(model, *model(*inputs, capture=((1, 3),)))
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1),
                                         rank=0, world_size=1)  # fmt: skip
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for name, gradient in gradients(wrapped, *wrapped(*inputs, capture=((1, 3),))).items():
            torch.testing.assert_close(gradient, expected[name.removeprefix("module.")], rtol=1e-6, atol=1e-7)
    finally:
        torch.distributed.destroy_process_group()


def test_scaled_fp16_training_unscales_to_the_same_gradients():
    inputs, results = batch(), []
    for scale in (1.0, 2.0**12):
        model = filled("fused").eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, *inputs)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert scaler.step(optimizer) is None
    for name, gradient in results[0].items():
        error = (results[1][name] - gradient).norm() / gradient.norm()
        assert error < 0.02, f"{name}: {error:.2g}"  # what fp16 loses to underflow without a scale


def test_light_recomputation_keeps_every_number():
    inputs = batch()
    kept, again = filled("fused").eval(), filled("fused", recompute="light").eval()
    actual, expected = (gradients(m, *m(*inputs, capture=((1, 3),))) for m in (again, kept))
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize(
    ("options", "capture", "error", "match"),
    [
        ({}, ((3, 1),), ValueError, "a student comes before its teacher"),
        ({}, ((2, 2),), ValueError, "a student comes before its teacher"),
        ({}, ((1, 5),), ValueError, "blocks are counted from 1 to 4"),
        ({}, ((0, 2),), ValueError, "blocks are counted from 1 to 4"),
        ({}, ((1, 3), (1, 4)), ValueError, "the student of one pair and the teacher of one"),
        ({}, ((1, 4), (2, 4)), ValueError, "the student of one pair and the teacher of one"),
        ({}, ((1, 3), (1, 3)), ValueError, "the student of one pair and the teacher of one"),
        ({}, ((1, 2, 3),), TypeError, "block numbers and .student, teacher. pairs"),
        ({}, ((1, "2"),), TypeError, "block numbers and .student, teacher. pairs"),
        ({}, ([1, 2],), TypeError, "block numbers and .student, teacher. pairs"),
        ({"kernels": "eager"}, ((1, 3),), ValueError, 'pairs are captured by kernels="fused"'),
    ],
)
def test_pairs_that_cannot_be_captured_are_named(options, capture, error, match):
    with pytest.raises(error, match=match):
        SiT(**TINY, **options)(*batch(), capture=capture)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kernels": "cuda"}, "unknown kernels='cuda'; expected one of 'fused', 'eager'"),
        ({"recompute": "all"}, "unknown recompute='all'; expected one of none, light, full"),
    ],
)
def test_unknown_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        SiT(**TINY, **options)
