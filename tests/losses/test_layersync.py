import copy
import math

import numpy as np
import pytest
import torch

from layersync_kernels import LayerSyncLoss, default_pair, layersync_loss


@pytest.fixture
def states():
    return {block: torch.randn(2, 5, 16, requires_grad=True) for block in (2, 3, 4, 6)}


def test_every_pair_counts(states):
    """The published code trains the last pair only: its subtraction stands outside the loop."""
    loss = LayerSyncLoss([(2, 4), (3, 6)], [0.2, 0.5])
    total = loss(states)
    expected = 0.2 * layersync_loss(states[2], states[4]) + 0.5 * layersync_loss(states[3], states[6])
    torch.testing.assert_close(total, expected)
    total.backward()
    assert states[2].grad.abs().max() > 0
    assert states[3].grad.abs().max() > 0
    assert states[4].grad is None
    assert states[6].grad is None


def test_cosine_is_reported_per_pair_without_graph_or_sync(states):
    loss = LayerSyncLoss([(2, 4), (3, 6)])
    loss(states)
    assert set(loss.cosine) == {"2:4", "3:6"}
    for key, value in loss.cosine.items():
        student, teacher = map(int, key.split(":"))
        assert isinstance(value, torch.Tensor)
        assert not value.requires_grad
        torch.testing.assert_close(
            value, torch.cosine_similarity(states[student], states[teacher], dim=-1).mean().detach()
        )


def test_integers_of_numpy_are_block_numbers():
    assert LayerSyncLoss([(np.int64(2), np.int64(4))]).layers == (2, 4)
    with pytest.raises(ValueError, match=r"did you mean \(2, 4\)"):
        LayerSyncLoss([(np.int64(4), np.int64(2))])


def test_mask_and_weight_reach_every_pair(states):
    mask, weight = torch.rand(2, 5) > 0.5, torch.rand(2, 1)
    total = LayerSyncLoss([(2, 4), (3, 6)], 1.0)(states, mask=mask, token_weight=weight)
    expected = sum(layersync_loss(states[s], states[t], mask=mask, token_weight=weight) for s, t in ((2, 4), (3, 6)))
    torch.testing.assert_close(total, expected)


def test_layers_lists_what_to_capture():
    assert LayerSyncLoss([(4, 6), (2, 4)]).layers == (2, 4, 6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 1, 9: 1, 19: 1, 20: 0, 50: 0}),
        ("linear", {0: 1, 10: 1, 15: 0.5, 18: 0.2, 20: 0, 50: 0}),
        ("cosine", {0: 1, 10: 1, 15: 0.5, 18: 0.5 * (1 + math.cos(0.8 * math.pi)), 20: 0, 50: 0}),
    ],
)
def test_schedules(schedule, expected, states):
    start = 0 if schedule == "constant" else 10
    loss = LayerSyncLoss([(2, 4)], 0.3, schedule=schedule, start_step=start, stop_step=20)
    full = 0.3 * layersync_loss(states[2], states[4])
    for step, factor in expected.items():
        assert loss.factor(step) == pytest.approx(factor)
        assert loss.active(step) == (factor > 0)
        torch.testing.assert_close(loss(states, step=step), factor * full.detach(), check_layout=False)


def test_every_n_steps(states):
    loss = LayerSyncLoss([(2, 4)], every=3)
    assert [loss.active(step) for step in range(7)] == [True, False, False, True, False, False, True]
    assert loss.cosine["2:4"].isnan()  # nothing has been computed yet
    loss(states, step=0)
    last = loss.cosine["2:4"]
    assert last == -layersync_loss(states[2], states[4])
    assert loss({}, step=1) == 0
    assert loss.cosine["2:4"] is last


def test_a_copy_is_independent(states):
    loss = LayerSyncLoss([(2, 4)])
    loss(states)
    twin = copy.deepcopy(loss)
    torch.testing.assert_close(twin(states), loss(states))
    assert not loss.state_dict()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([],), "at least one"),
        (([(8, 8)],), "both block 8"),
        (([(16, 8)],), r"did you mean \(8, 16\)"),
        (([(0, 8)],), "counted from 1, got student 0"),
        (([(2, 4), (2, 4)],), "given twice"),
        (([(2, 4)], [0.1, 0.2]), "2 weights for 1 pairs"),
    ],
)
def test_bad_pairs_are_explained(arguments, match):
    with pytest.raises(ValueError, match=match):
        LayerSyncLoss(*arguments)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"schedule": "exponential"}, "unknown schedule 'exponential'"),
        ({"schedule": "linear"}, "needs stop_step > start_step"),
        ({"schedule": "cosine", "start_step": 5, "stop_step": 5}, "needs stop_step > start_step"),
        ({"start_step": 5}, "a constant schedule has none"),
        ({"every": 0}, "every must be at least 1"),
    ],
)
def test_bad_schedules_are_explained(options, match):
    with pytest.raises(ValueError, match=match):
        LayerSyncLoss([(2, 4)], **options)


def test_a_missing_state_or_step_is_explained(states):
    with pytest.raises(ValueError, match=r"blocks \[8\] were not captured, only \[2, 3, 4, 6\]"):
        LayerSyncLoss([(2, 8)])(states)
    with pytest.raises(ValueError, match="needs to know the step"):
        LayerSyncLoss([(2, 4)], every=2)(states)


def test_default_pairs():
    assert [default_pair(depth) for depth in (28, 24, 30)] == [(8, 16), (8, 18), (9, 17)]
    for depth in range(4, 100):
        student, teacher = default_pair(depth)
        assert 1 <= student < teacher <= 0.8 * depth
        assert depth < 6 or student > 1
    assert default_pair(2) == (1, 2)
    with pytest.raises(ValueError, match="at least 2 blocks, got depth 1"):
        default_pair(1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_module_compiles_without_graph_breaks(backend, states):
    torch._dynamo.reset()
    loss = LayerSyncLoss([(2, 4), (3, 6)], backend=backend)
    compiled = torch.compile(lambda states: loss(states), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(states), loss(states))
