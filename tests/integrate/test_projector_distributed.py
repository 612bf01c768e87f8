"""Projectors on two processes: DDP, FSDP2 and torchtitan's order of wrappers; and a loss over the batches of both."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from layersync_kernels import LayerSync, RepresentationAlignmentLoss
from layersync_kernels.functional.dispersive import dispersive_loss
from layersync_kernels.ops.dispersive import dispersive_loss_reference

from .distributed import WORLD, run
from .test_sync import WIDTH, Model, by_hand, gradients, hidden_states


def ddp(model):
    return DistributedDataParallel(model)


def ddp_with_unused(model):
    model.unused = nn.Linear(2, 2)
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp2(model):
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def torchtitan(model):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
        model.blocks[index].compile(backend="aot_eager", fullgraph=True)
    return fsdp2(model)


TEACHER = 12
WRAPPERS = {"DDP": ddp, "DDP, find_unused_parameters": ddp_with_unused, "FSDP2": fsdp2, "torchtitan": torchtitan}


def full(name, tensor):
    clean = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
    return clean, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def error(name, projector, rank):
    """The largest error of a gradient, relative to the largest gradient, in three steps."""
    torch.manual_seed(0)
    model = Model()
    if projector:
        model.projector = nn.Linear(WIDTH, WIDTH)
    reference = copy.deepcopy(model)
    wrapped = WRAPPERS[name](model)
    sync = LayerSync(wrapped, 2, 4, projector="projector" if projector else None)
    worst = 0.0
    for _ in range(3):
        batch = torch.randn(WORLD, 3, 7, WIDTH)
        total = 0.0
        for x in batch:
            states = hidden_states(reference, x)
            student = reference.projector(states[1]) if projector else states[1]
            total = total + (states[-1].square().mean() + 0.2 * by_hand(student, states[3])) / WORLD
        wanted = gradients(reference, total)
        wrapped.zero_grad()  # before the forward pass: afterwards FSDP2 shows other parameters than it steps
        (wrapped(batch[rank]).square().mean() + sync.loss()).backward()
        got = dict(full(n, p.grad) for n, p in wrapped.named_parameters() if p.grad is not None and "unused" not in n)
        assert got.keys() == wanted.keys()
        scale = max(gradient.abs().max() for gradient in wanted.values())
        worst = max(worst, *(float((got[n] - wanted[n]).abs().max() / scale) for n in wanted))
    return worst


class Aligned(nn.Module):
    """A model with losses that have parameters."""

    def __init__(self):
        super().__init__()
        self.model = Model()
        self.align = nn.ModuleList(
            RepresentationAlignmentLoss(WIDTH, TEACHER, 2, method=method, projector_dim=24)
            for method in ("repa", "irepa", "sra")
        )

    def forward(self, x, teacher):
        states = hidden_states(self.model, x)
        return states[-1].square().mean() + sum(align({2: states[1]}, teacher) for align in self.align)


def sharded(aligned):
    for align in aligned.align:
        fully_shard(align.projectors[0])
    return fully_shard(aligned)


def last_layer_sharded(aligned):
    fully_shard(aligned.align[0].projectors[0][-1])
    return fully_shard(aligned)


ALIGNED = {"DDP": ddp, "FSDP2": sharded, "FSDP2, last layer by itself": last_layer_sharded}


def aligned_error(name, rank):
    """The largest error of a loss or gradient, relative to the largest, in three steps of SGD."""
    torch.manual_seed(0)
    reference = Aligned()
    wrapped = ALIGNED[name](copy.deepcopy(reference))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (reference, wrapped)]
    worst = 0.0
    for _ in range(3):
        batch, teacher = torch.randn(WORLD, 3, 9, WIDTH), torch.randn(WORLD, 3, 9, TEACHER)
        losses = [reference(x, t) for x, t in zip(batch, teacher, strict=True)]
        wanted = gradients(reference, sum(losses) / WORLD)
        wrapped.zero_grad()
        loss = wrapped(batch[rank], teacher[rank])
        loss.backward()
        got = dict(full(n, p.grad) for n, p in wrapped.named_parameters())
        assert got.keys() == wanted.keys()
        scale = max(gradient.abs().max() for gradient in wanted.values())
        worst = max(
            worst, abs(loss - losses[rank]).item(), *(float((got[n] - wanted[n]).abs().max() / scale) for n in wanted)
        )
        for optimizer in optimizers:
            optimizer.step()
    return worst


def dispersive_error(rank):
    """The same of the dispersive loss over the samples of both processes, in a model under DDP."""
    torch.manual_seed(0)
    reference = nn.Linear(WIDTH, WIDTH)
    wrapped = DistributedDataParallel(copy.deepcopy(reference))
    batch = torch.randn(WORLD, 3, 7, WIDTH)
    expected = dispersive_loss_reference(reference(batch.flatten(0, 1)), 0.5)
    expected.backward()
    loss = dispersive_loss(wrapped(batch[rank]), temperature=0.5, gather="world")
    loss.backward()
    wanted, got = reference.weight.grad, wrapped.module.weight.grad
    return max(abs(loss - expected).item(), ((got - wanted).abs().max() / wanted.abs().max()).item())


def all_errors(rank):
    return {
        **{(name, projector): error(name, projector, rank) for name in WRAPPERS for projector in (True, False)},
        **{name: aligned_error(name, rank) for name in ALIGNED},
        "dispersive": dispersive_error(rank),
    }


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    return run(all_errors, tmp_path_factory.mktemp("gloo"), seconds=120)


@pytest.mark.parametrize("projector", [True, False], ids=["projector", "no projector"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_gradients_on_every_process_are_those_of_both_batches(name, projector, errors):
    for found in errors:
        assert found[name, projector] < 1e-5


@pytest.mark.parametrize("name", ALIGNED)
def test_the_losses_own_projectors_learn_from_both_batches(name, errors):
    for found in errors:
        assert found[name] < 1e-5


def test_samples_of_all_processes_disperse_as_one_batch(errors):
    for found in errors:
        assert found["dispersive"] < 1e-5
