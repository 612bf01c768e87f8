"""Several processes train what one trains: the same losses, weights, averages and optimiser, whatever is shared how."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from layersync_kernels.bench.memory import most_held
from layersync_kernels.errors import ConfigError, TrainingDiverged
from layersync_kernels.sit.batch import Share
from layersync_kernels.sit.config.loss import AlignConfig, DispersiveConfig, LayerSyncConfig, ScheduleConfig
from layersync_kernels.sit.config.model import ModelConfig
from layersync_kernels.sit.config.optim import OptimConfig
from layersync_kernels.sit.config.parallel import ParallelConfig
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.distributed.parallel import Parallel, share_of
from layersync_kernels.sit.distributed.processes import ALONE, Processes
from layersync_kernels.sit.distributed.shards import own_part, whole
from layersync_kernels.sit.modality.audio import Waveform
from layersync_kernels.sit.models.registry import build_model
from layersync_kernels.sit.spec import SampleSpec
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.state import TrainState

from ..integrate.distributed import run
from .tiny import tiny_config, tiny_data

STEPS = 5
BATCH = {"batch_size": 8}
REPA = {"align": "repa", "teacher": f"{__name__}:teacher", "align_block": 1, "projector_dim": 8}


def teacher(modality):
    """Fixed tokens (B, 12, 3) of sequences."""
    torch.manual_seed(5)
    layer = nn.Conv1d(1, 3, 1)
    return lambda samples, lengths: layer(samples)


def picture_teacher(modality):
    """Fixed features (B, 3, 2, 2) of pictures."""
    torch.manual_seed(5)
    layer = nn.Conv2d(1, 3, 2, stride=2)
    return lambda samples, lengths: layer(samples)


def sequences():
    """Up to 12 long."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 13, (40,), generator=generator)
    samples = torch.randn(40, 1, 12, generator=generator)
    return MemorySet(
        spec=SampleSpec(1, (12,), variable=True),
        num_classes=2,
        class_names=["a", "b"],
        modality=Waveform(sample_rate=8000),
        samples=torch.where(torch.arange(12) < lengths[:, None, None], samples, 0),
        labels=torch.arange(40) % 2,
        lengths=lengths,
    )


def images(**groups):
    return tiny_config(optim=BATCH | groups.pop("optim", {}), **groups), tiny_data()


def motions(**groups):
    changes = {"data": {"flip": False}, "model": {"patch_size": 1}} | groups
    return tiny_config(optim=BATCH | changes.pop("optim", {}), **changes), sequences()


CASES = {
    "images": lambda: images(),
    "two passes, two averages": lambda: images(optim={"accumulate": 2, "ema_decay": (0.9, 0.5)}),
    "lengths": lambda: motions(),
    "lengths, two passes": lambda: motions(optim={"accumulate": 2}),
    "repa": lambda: motions(align=AlignConfig(**REPA), optim={"accumulate": 2}),
    "repa in every other step": lambda: motions(align=AlignConfig(**REPA, align_when=ScheduleConfig(every=2))),
    "irepa, dispersive, two passes": lambda: images(
        align=AlignConfig("irepa", f"{__name__}:picture_teacher", align_block=2),
        dispersive=DispersiveConfig("auto", 2.0),
        optim={"accumulate": 2},
    ),
    "sra, dispersive, lengths, two passes": lambda: motions(
        align=AlignConfig("sra", align_block=1, align_teacher_block=3),
        dispersive=DispersiveConfig(1, 5.0, 0.1),
        optim={"accumulate": 2},
    ),
    "not clipped, light": lambda: images(optim={"clip_norm": None}, model={"recompute": "light"}),
    "eager, two pairs": lambda: images(
        model={"kernels": "eager"}, layersync=LayerSyncConfig(layersync=("1:3", "2:3"), weight=(0.2, 0.1))
    ),
    "bf16": lambda: images(precision="bf16"),
    "fp16": lambda: images(precision="fp16"),
}


class Steady(TrainState):
    """Without the default eps of 1e-8, AdamW makes whole steps of gradients that are nothing but rounding."""

    def build_optimizer(self):
        return torch.optim.AdamW(self.trained, lr=self.config.lr, eps=1e-3, fused=True)


class SteadyTrainer(Trainer):
    state_type = Steady


def trained(case, processes=ALONE, **parallel):
    """What there is after some steps, and the means of each step."""
    config, data = CASES[case]()
    trainer = SteadyTrainer(dataclasses.replace(config, parallel=ParallelConfig(**parallel)), data, processes=processes)
    records = []
    for number in range(1, STEPS + 1):
        trainer.advance(number)
        records.append(trainer.meter.read(processes))
    state = trainer.state
    tensors = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    for stem, ema in state.emas.items():
        tensors |= {f"{stem}.{name}": tensor for name, tensor in ema.state_dict().items()}
    for name, parameter in zip(state.names, state.trained, strict=True):
        tensors[f"optimizer.{name}"] = state.optimizer.state[parameter]["exp_avg"]
    held = sum(own_part(tensor).numel() for tensor in tensors.values())
    return {name: whole(tensor).clone() for name, tensor in tensors.items()}, records, held


@functools.cache
def alone(case):
    return trained(case)


def all_cases(rank, *, world, **parallel):
    processes = Processes(rank, world, 2)
    return {case: trained(case, processes, **parallel) for case in CASES}


WAYS = {
    "ddp-2": (2, {}),
    "fsdp-2": (2, {"parallel": "fsdp"}),
    "fsdp-2-kept": (2, {"parallel": "fsdp", "reshard": False}),
    "ddp-4": (4, {}),
    "hsdp-4": (4, {"parallel": "hsdp"}),
}
SLOW = ("fsdp-2-kept", "ddp-4", "hsdp-4")


def marked(way):
    """One worker has all tests of a way, which share their processes."""
    marks = [pytest.mark.xdist_group(f"processes {way}"), *([pytest.mark.slow] if way in SLOW else [])]
    return pytest.param(way, marks=marks)


@pytest.fixture(scope="module", params=map(marked, WAYS))
def found(request, tmp_path_factory):
    """Results of all processes, by case."""
    world, parallel = WAYS[request.param]
    function = functools.partial(all_cases, world=world, **parallel)
    return request.param, run(function, tmp_path_factory.mktemp(request.param), 240, world=world)


@pytest.mark.parametrize("case", CASES)
def test_processes_train_what_one_trains(found, case):
    way, results = found
    tensors, records, held = alone(case)
    rough = 100 if case in ("bf16", "fp16") else 1
    if not way.startswith("ddp"):
        assert sum(of_rank[case][2] for of_rank in results) == held * len(results) // 2
        assert all(of_rank[case][2] < held * 0.52 for of_rank in results)
    for of_rank in results:
        theirs, their_records, _ = of_rank[case]
        for mine, other in zip(records, their_records, strict=True):
            assert other == pytest.approx(mine, rel=2e-5 * rough, abs=2e-6 * rough)
        assert theirs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                theirs[name], tensor, rtol=0, atol=1e-5 * rough, msg=lambda m, n=name: f"{n}: {m}"
            )


def diverging(rank):
    """What is raised where one process has a loss that is not finite."""
    config, data = CASES["images"]()
    trainer = Trainer(config, data, processes=Processes(rank, 2, 2))
    if rank == 1:
        losses = trainer.transport.training_losses

        class Broken:
            def training_losses(self, *arguments, **keywords):
                output = losses(*arguments, **keywords)
                return output | {"loss": output["loss"] * float("nan")}

        trainer.transport = Broken()
    with pytest.raises(TrainingDiverged) as raised:
        trainer.advance(3)
    return str(raised.value)


def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path):
    first, second = run(diverging, tmp_path, 120)
    assert first == second
    assert "the loss was not finite at step 1; no checkpoint had been saved yet" in first


def drawn(rank, parallel):
    """Weights of a model and of its copy, and how much of the random numbers was used up."""
    torch.manual_seed(7)
    config, data = CASES["images"]()
    built = Parallel(ParallelConfig(parallel=parallel), Processes(rank, 2, 2), torch.device("cpu"), dtype=None)
    model = built.build(lambda: build_model(config.model, data.spec, data.num_classes))
    after = torch.rand(3)
    return [{n: whole(t).clone() for n, t in m.state_dict().items()} for m in (model, built.copy(model))], after


def started(rank):
    """The most bytes of tensors that each part of a divided model's start adds; its parameters, the largest of them."""
    parallel = Parallel(ParallelConfig(parallel="fsdp"), Processes(rank, 2, 2), torch.device("cpu"), dtype=None)
    make = functools.partial(build_model, ModelConfig(model="SiT-P/2", depth=4), SampleSpec(1, (4, 4)), 3)
    found = []

    def measured(function):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = function()
        found.append(most_held(profiler))
        return result

    def step():
        for parameter in state.trained:
            parameter.grad = torch.zeros_like(parameter)
        state.optimizer.step()

    model = measured(lambda: parallel.build(make))
    state = measured(lambda: TrainState(model, [], OptimConfig(), seed=0, parallel=parallel))
    measured(step)
    sizes = [parameter.numel() for parameter in model.parameters()]
    return found, sum(sizes), max(sizes)


def test_a_divided_model_starts_within_its_share_of_memory(tmp_path):
    for found, parameters, largest in run(started, tmp_path, 120):
        assert largest < 0.1 * parameters
        for held, each in zip(found, (4, 4, 12), strict=True):  # bytes: weights; average; gradient and two moments
            share = each * parameters / 2
            assert 0.95 * share < held < 1.02 * share + 4 * largest * 1.5  # a whole tensor, and the own part of it


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_weights_are_those_that_one_process_draws(tmp_path, parallel):
    torch.manual_seed(7)
    config, data = CASES["images"]()
    weights = build_model(config.model, data.spec, data.num_classes).state_dict()
    after = torch.rand(3)
    for models, theirs in run(functools.partial(drawn, parallel=parallel), tmp_path, 120):
        assert torch.equal(theirs, after)
        for found in models:
            assert found.keys() == weights.keys()
            assert all(torch.equal(found[name], weights[name]) for name in weights)


SHARES = [
    ({"batch_size": 6}, 4, "--batch-size 6, which is that of all processes, does not divide into 4 processes; give a"),
    ({"batch_size": 6, "accumulate": 3}, 4, "4 processes and --accumulate 3; give a multiple of 12"),
]


@pytest.mark.parametrize(("optim", "world", "message"), SHARES)
def test_a_batch_that_does_not_divide_is_refused(optim, world, message):
    with pytest.raises(ConfigError, match=message):
        share_of(OptimConfig(**optim), Processes(1, world, world))


def test_shares_of_a_pass_are_the_pass():
    rows = torch.arange(24)
    for passes in (1, 2, 3):
        shares = [Share(rank, 4, passes).of(rows) for rank in range(4)]
        for number in range(passes):
            parts = [share.chunk(passes)[number] for share in shares]
            assert torch.equal(torch.cat(parts), rows.chunk(passes)[number])


@pytest.mark.parametrize(("world", "size"), [(4, 3), (4, 4), (4, 1), (2, None)])
def test_copies_that_processes_do_not_make_are_refused(world, size):
    config = ParallelConfig(parallel="hsdp", shard_size=size)
    with pytest.raises(ConfigError, match=f"{world} processes do not make several copies"):
        Parallel(config, Processes(0, world, world), torch.device("cpu"), dtype=None)
