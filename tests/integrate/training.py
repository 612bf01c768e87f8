"""The training loop of the matrix, with the alignment by `LayerSync` or by hand, and how the two are compared."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from layersync_kernels import LayerSync

from .targets import Batch, Target

STEPS = 10
LEARNING_RATE = 0.01
WEIGHT = 1.0  # above the method's 0.2, so that a missing alignment stands out from the noise of bf16

Alignment = Callable[[Batch], Tensor | float]


@dataclass
class Step:
    """What is compared: the loss of each micro-batch, and the gradient of each trained parameter."""

    losses: list[float]
    gradients: dict[str, Tensor]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def attach(target: Target, model: nn.Module) -> Alignment:
    sync = LayerSync(model, weight=WEIGHT, **target.sync)
    return lambda batch: sync.loss(mask=batch.mask)


def attach_by_hand(target: Target, model: nn.Module) -> Alignment:
    """The eager formula on what both blocks return; their forward is patched to keep it."""
    kept = {}

    def keep(path: str) -> None:
        block = model.get_submodule(path)
        forward = block.forward

        def keeping(*args, **kwargs):
            output = forward(*args, **kwargs)
            kept[path] = target.tokens(output)
            return output

        block.forward = keeping

    for path in target.pair:
        keep(path)

    def loss(batch: Batch) -> Tensor:
        student, teacher = (kept.pop(path).float() for path in target.pair)
        cosine = (F.normalize(student, dim=-1) * F.normalize(teacher.detach(), dim=-1)).sum(-1)
        mean = cosine.mean() if batch.mask is None else (cosine * batch.mask).sum() / batch.mask.sum()
        return -WEIGHT * mean

    return loss


def without(target: Target, model: nn.Module) -> Alignment:
    """No alignment: the control that tells a fault of the model in some mode from one of `LayerSync`."""
    return lambda batch: 0.0


def activations() -> list[Tensor]:
    """The tensors of an autograd graph that something in Python holds."""
    return [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.grad_fn is not None]


def train(
    target: Target,
    model: nn.Module,
    align: Alignment,
    parameters: dict[str, nn.Parameter],
    *,
    steps: Iterable[int] = range(STEPS),
    microbatches: int = 1,
    share: Sequence[int] | None = None,
    autocast: bool = False,
    scaled: bool = False,
    copied: bool = False,
    watched: bool = True,
) -> list[Step]:
    """Train, and check that nothing of a step outlives it.

    Args:
        target: where batches and the task's loss come from.
        model: the model as the trainer calls it.
        align: the term to add to the task's loss.
        parameters: the trained ones, by their name in the unwrapped model.
        steps: numbers of the steps; the batches depend on them.
        microbatches: how many make a step.
        share: which of them this process sees; None is all.
        autocast: run the model in bf16.
        scaled: scale the loss as for fp16.
        copied: between forward pass and loss, copy the model as an EMA is made, and evaluate the copy.
        watched: look for activations that outlive their step, in the second one.
    """
    optimizer = torch.optim.SGD(parameters.values(), LEARNING_RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    share = range(microbatches) if share is None else share
    trajectory = []

    def backward(batch: Batch, watched: bool) -> tuple[float, list[weakref.ref]]:
        older = {id(tensor) for tensor in activations()} if watched else set()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            task = target.task_loss(model, batch)
        if copied:
            with torch.no_grad():
                target.task_loss(copy.deepcopy(model), batch)
        alive = [weakref.ref(tensor) for tensor in activations() if id(tensor) not in older] if watched else []
        loss = task + align(batch)
        scaler.scale(loss / len(share)).backward()
        return loss.item(), alive

    for step in steps:
        losses, alive = [], []
        for index in share:
            loss, seen = backward(target.batch(step * microbatches + index), watched and len(trajectory) == 1)
            losses.append(loss)
            alive += seen
        scaler.unscale_(optimizer)
        trajectory.append(Step(losses, {name: gradient(parameter) for name, parameter in parameters.items()}))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        kept = [tuple(tensor.shape) for reference in alive if (tensor := reference()) is not None]
        assert not kept, f"tensors of the graph outlive their step: {kept}"
    return trajectory


def gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.shape)
    return parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad.clone()


@cache
def reference(target: Target, microbatches: int = 1, autocast: bool = False, aligned: bool = True) -> list[Step]:
    """The trajectory in eager mode, in one process, with the alignment added by hand."""
    model = target.build()
    align = (attach_by_hand if aligned else without)(target, model)
    return train(target, model, align, trained(model), microbatches=microbatches, autocast=autocast, watched=False)


def distance(trajectory: Sequence[Step], expected: Sequence[Step], share: slice = slice(None)) -> float:
    """The largest relative error of any loss and any parameter's gradient (in norm) at any step.

    A gradient's error is relative to its norm, or to a hundredth of the largest norm of all parameters: the bias of
    attention's keys, say, has no gradient but noise. `share` are the micro-batches that the trajectory saw.
    """
    errors = []
    for step, truth in zip(trajectory, expected, strict=True):
        norms = {name: gradient.norm().item() for name, gradient in truth.gradients.items()}
        floor = 1e-2 * max(norms.values())
        errors += [abs(a - b) / max(abs(b), 1.0) for a, b in zip(step.losses, truth.losses[share], strict=True)]
        errors += [
            (step.gradients[name] - gradient).norm().item() / max(norms[name], floor)
            for name, gradient in truth.gradients.items()
        ]
    return max(error if error == error else float("inf") for error in errors)


@dataclass
class Cell:
    """What came of a cell: an error, or why the model itself, without `LayerSync`, does not do it."""

    error: float = float("inf")
    refusal: str = ""

    @classmethod
    def refused(cls, failure: Exception) -> "Cell":
        return cls(refusal=f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]}")
