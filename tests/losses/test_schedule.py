"""The schedule that every alignment loss has, apart from a loss."""

import dataclasses
import pickle

import pytest
import torch
from torch import nn

from layersync_kernels import LayerSyncLoss, RepresentationAlignmentLoss
from layersync_kernels.losses.schedule import Schedule

DECAY = {"start_step": 10, "stop_step": 20, "every": 5}

LOSSES = {
    "LayerSyncLoss": lambda **schedule: LayerSyncLoss([(2, 4)], 0.5, **schedule),
    "RepresentationAlignmentLoss": lambda **schedule: RepresentationAlignmentLoss(
        8, 8, 2, projector=nn.Identity(), weights=0.5, **schedule
    ),
}


def test_the_default_is_always_on():
    schedule = Schedule()
    assert not schedule.needs_step
    assert [schedule.factor(step) for step in (0, 1, 10**9)] == [1, 1, 1]


def test_a_decay_between_two_steps_in_every_fifth():
    schedule = Schedule("linear", **DECAY)
    assert schedule.needs_step
    assert [schedule.factor(step) for step in (0, 10, 13, 15, 20, 25)] == [1, 1, 0, 0.5, 0, 0]
    assert [schedule.active(step) for step in (0, 13, 15, 20)] == [True, False, True, False]


def test_its_errors_are_without_a_name_until_a_loss_gives_its_own():
    for arguments, message in (
        (("exponential",), "unknown schedule 'exponential'"),
        (("linear",), "schedule 'linear' needs stop_step"),
        (("constant", 5), "start_step is where a decay begins"),
        (("constant", 0, None, 0), "every must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            Schedule(*arguments)
        names = (field.name for field in dataclasses.fields(Schedule))
        options = dict(zip(("schedule", *list(names)[1:]), arguments, strict=False))
        for name, make in LOSSES.items():
            with pytest.raises(ValueError, match=f"^{name}: {message}"):
                make(**options)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_one_and_survives_a_file(name):
    loss = pickle.loads(pickle.dumps(LOSSES[name](schedule="cosine", **DECAY)))
    assert loss.schedule == Schedule("cosine", **DECAY)
    assert "schedule=cosine, every=5" in repr(loss)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.schedule.every = 1


@pytest.mark.parametrize("name", LOSSES)
def test_the_factor_of_a_step_is_part_of_a_compiled_loss(name):
    torch._dynamo.reset()
    loss = LOSSES[name](schedule="cosine", start_step=10, stop_step=20)
    tokens = torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def run(step):
        if name == "LayerSyncLoss":
            return loss(dict(zip((2, 4), tokens, strict=True)), step=step)
        return loss({2: tokens[0]}, tokens[1], step=step)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for step in (0, 10, 15, 20):
        assert torch.equal(compiled(step), run(step))
