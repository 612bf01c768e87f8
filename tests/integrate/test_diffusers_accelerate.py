"""`LayerSync` in the training loop of diffusers' scripts: accelerate, accumulation, clipping, a moving average."""

import pytest
import torch

from layersync_kernels import LayerSync

from .targets import TARGETS, Target
from .training import LEARNING_RATE, WEIGHT, attach_by_hand

STEPS, ACCUMULATION, DECAY = 4, 2, 0.9


@pytest.fixture
def dit():
    pytest.importorskip("diffusers")
    return next(target for target in TARGETS if target.name == "DiT")


@pytest.fixture
def accelerator(request):
    """Its settings are the process's, so that they must not reach other tests."""
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(gradient_accumulation_steps=ACCUMULATION, mixed_precision=request.param, cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def train_as_diffusers_does(target: Target, accelerator):
    from diffusers.training_utils import EMAModel

    model = target.build()
    ema = EMAModel(model.parameters(), decay=DECAY, model_cls=type(model), model_config=model.config)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    sync = LayerSync(model, student=2, teacher=3, weight=WEIGHT)
    losses = []
    for index in range(STEPS * ACCUMULATION):
        with accelerator.accumulate(model):
            batch = target.batch(index)
            loss = target.task_loss(model, batch) + sync.loss()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(model.parameters())
        losses.append(accelerator.gather(loss.detach()).mean().item())
    trained = [parameter.detach().clone() for parameter in accelerator.unwrap_model(model).parameters()]
    ema.copy_to(model.parameters())
    with torch.no_grad():
        validation = target.task_loss(model, target.batch(0)) + sync.loss()
    return losses, validation.item(), trained


def train_by_hand(target: Target, autocast: bool):
    model = target.build()
    align = attach_by_hand(target, model)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    losses = []
    for step in range(STEPS):
        for index in range(ACCUMULATION):
            batch = target.batch(step * ACCUMULATION + index)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                task = target.task_loss(model, batch)
            loss = task + align(batch)
            (loss / ACCUMULATION).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(DECAY, (1 + step) / (10 + step)) if step else 0.0  # as EMAModel warms it up
        for slow, parameter in zip(average, model.parameters(), strict=True):
            slow.lerp_(parameter.detach(), 1 - decay)
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for slow, parameter in zip(average, model.parameters(), strict=True):
            parameter.copy_(slow)
        validation = target.task_loss(model, target.batch(0))
    return losses, validation.item(), trained


@pytest.mark.parametrize(
    ("accelerator", "tolerance"), [("no", 1e-4), ("bf16", 5e-2)], indirect=["accelerator"], ids=["fp32", "bf16"]
)
def test_same_training_as_by_hand(dit, accelerator, tolerance):
    losses, validation, trained = train_as_diffusers_does(dit, accelerator)
    autocast = accelerator.mixed_precision == "bf16"
    expected_losses, expected_validation, expected = train_by_hand(dit, autocast)
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    assert validation == pytest.approx(expected_validation, rel=tolerance)
    for start, got, wanted in zip(dit.build().parameters(), trained, expected, strict=True):
        assert (got - wanted).norm() <= tolerance * max((wanted - start).norm().item(), 1e-3)
