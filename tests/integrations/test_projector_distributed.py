"""A projector in the model, on two processes: DDP, FSDP2 and torchtitan's order of wrappers."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from layersync_kernels import LayerSync

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


def all_errors(rank):
    return {(name, projector): error(name, projector, rank) for name in WRAPPERS for projector in (True, False)}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    return run(all_errors, tmp_path_factory.mktemp("gloo"), seconds=120)


@pytest.mark.parametrize("projector", [True, False], ids=["projector", "no projector"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_gradients_on_every_process_are_those_of_both_batches(name, projector, errors):
    for found in errors:
        assert found[name, projector] < 1e-5
