"""`LayerSync` in the models of other libraries, in every way in which they are trained, against the formula by hand."""

import io
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import _inductor as inductor
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from . import table
from .distributed import WORLD
from .distributed import run as run_distributed
from .targets import TARGETS, Target
from .training import STEPS, Cell, Step, attach, distance, reference, train, trained, without

# In every cell the alignment moves the gradients by more than this, several times the widest tolerance.
SHARE = 0.5


def backend(target: Target) -> str:
    return "inductor" if target.inductor else "aot_eager"


def compile_blocks(target: Target, model: nn.Module) -> nn.Module:
    """By diffusers' own method where the model has it, else block by block as most trainers do."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True, backend=backend(target))
        return model
    for container in target.containers(model):
        for index, block in enumerate(container):
            container[index] = torch.compile(block, fullgraph=True, backend=backend(target))
    return model


def compile_model(target: Target, model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend(target))


def checkpoint_blocks(target: Target, model: nn.Module) -> nn.Module:
    target.use_checkpoints(model, None)
    return model


def checkpoint_selectively(target: Target, model: nn.Module) -> nn.Module:
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]
    target.use_checkpoints(model, partial(create_selective_checkpoint_contexts, products))
    return model


@dataclass(frozen=True)
class Mode:
    """How a model is trained. bf16's noise is what two orders of the same sums differ by."""

    wrap: Callable[[Target, nn.Module], nn.Module] = lambda target, model: model
    compiled: bool = False
    reloaded: bool = False
    tolerance: float = 1e-4
    options: dict[str, Any] = field(default_factory=dict)


MODES = {
    "eager": Mode(),
    "compiled blocks": Mode(compile_blocks, compiled=True),
    "compiled model": Mode(compile_model, compiled=True),
    "checkpoint": Mode(checkpoint_blocks),
    "selective checkpoint": Mode(checkpoint_selectively),
    "accumulation": Mode(options={"microbatches": 2}),
    "bf16": Mode(options={"autocast": True}, tolerance=1e-1),  # 7e-2 was seen on a CPU with units for bf16
    "scaler": Mode(options={"scaled": True}),
    "EMA": Mode(options={"copied": True}),
    "reload": Mode(reloaded=True),
}


def ddp(target: Target, model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(target: Target, model: nn.Module) -> nn.Module:
    for container in target.containers(model):
        for block in container[target.sharded_from :]:
            fully_shard(block)
    return fully_shard(model)


DISTRIBUTED_MODES = {"DDP": Mode(ddp), "FSDP2": Mode(fsdp2)}
ALL_MODES = [*MODES, *DISTRIBUTED_MODES]
TRACED = ("SiT, published block", "DiT", "MDM encoder")
"""Whose model as a whole is compiled in every run of the tests."""
LIKE_OTHERS = ("CogVideoX", "LTX", "Stable Audio", "PixArt", "SD3")
"""Whose compiled cells are all for `make slow`."""
SHARED = (*TRACED, "Flux")
"""Which two processes train in every run of the tests."""
COMPILED = [name for name, mode in MODES.items() if mode.compiled]


def run(target: Target, mode: Mode, aligned: bool) -> list[Step]:
    add = attach if aligned else without
    model = target.build()
    parameters = trained(model)
    model = mode.wrap(target, model)
    go = partial(train, target, **mode.options)
    align = add(target, model)
    if mode.compiled:
        torch.compiler.reset()
        with inductor.config.patch(fallback_random=True):  # eager's random numbers: DiT drops labels
            first = go(model, align, parameters, steps=range(1))
        with torch.compiler.set_stance("fail_on_recompile"):
            return first + go(model, align, parameters, steps=range(1, STEPS))
    if mode.reloaded:
        half = STEPS // 2
        first = go(model, align, parameters, steps=range(half))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
        return first + go(model, add(target, model), trained(model), steps=range(half, STEPS))
    return go(model, align, parameters)


def error(target: Target, mode: Mode, aligned: bool) -> float:
    options = {name: value for name, value in mode.options.items() if name in ("microbatches", "autocast")}
    return distance(run(target, mode, aligned), reference(target, **options, aligned=aligned))


def try_cell(target: Target, mode: Mode) -> Cell:
    """A control without `LayerSync` tells whether a failure is the model's own."""
    try:
        found = error(target, mode, aligned=True)
        if found <= mode.tolerance:
            return Cell(found)
    except Exception:
        try:
            error(target, mode, aligned=False)
        except Exception as failure:
            return Cell.refused(failure)
        raise
    control = error(target, mode, aligned=False)
    return Cell(found) if control <= mode.tolerance else Cell(refusal=f"off by {control:.0e} without LayerSync")


def distributed_error(target: Target, mode: Mode, rank: int, aligned: bool, steps: int) -> float:
    model = target.build()
    wrapped = mode.wrap(target, model)
    align = (attach if aligned else without)(target, wrapped)
    trajectory = train(target, wrapped, align, trained(model), steps=range(steps), microbatches=WORLD, share=[rank])
    return distance(trajectory, reference(target, WORLD, aligned=aligned)[:steps], slice(rank, rank + 1))


def distributed_cell(target: Target, mode: Mode, rank: int) -> Cell:
    """The control comes first here: after a failure that left the processes out of step, it would fail as well."""
    try:
        distributed_error(target, mode, rank, aligned=False, steps=1)
    except Exception as failure:
        cell = Cell.refused(failure)
    else:
        cell = Cell(distributed_error(target, mode, rank, aligned=True, steps=STEPS))
    dist.barrier()  # raises where the processes are out of step
    return cell


def distributed_cells(rank: int, names: set[str]) -> dict[tuple[str, str], Cell | str]:
    """Those of some targets; a string is a traceback."""
    cells: dict[tuple[str, str], Cell | str] = {}
    for target in (target for target in TARGETS if target.name in names):
        for name, mode in DISTRIBUTED_MODES.items():
            if target.installed:
                try:
                    cells[target.name, name] = distributed_cell(target, mode, rank)
                except Exception:
                    cells[target.name, name] = traceback.format_exc()
    return cells


@pytest.fixture(scope="module")
def cells(request):
    """What came of each cell so far; the table is made of it."""
    found: dict[tuple[str, str], Cell] = {}
    yield found
    if path := request.config.getoption("--write-matrix"):
        table.write(path, TARGETS, ALL_MODES, COMPILED, found, SHARE)


@pytest.fixture(scope="module")
def distributed(request, tmp_path_factory):
    """The cells that this session asks for."""
    items = [item for item in request.session.items if "distributed" in getattr(item, "fixturenames", ())]
    names = {item.callspec.params["target"].name for item in items}
    return run_distributed(partial(distributed_cells, names=names), tmp_path_factory.mktemp("matrix"), seconds=900)


def dashed(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: dashed(target.name))


def need(target: Target) -> None:
    for library in target.libraries:
        pytest.importorskip(library)


def judge(cell: Cell, tolerance: float) -> None:
    if cell.refusal:
        pytest.skip(f"the model itself does not do it: {cell.refusal}")
    assert cell.error <= tolerance


@each_target
def test_the_alignment_is_no_trifle_in_the_gradients(target):
    """Else a cell without any alignment would pass."""
    need(target)
    assert distance(reference(target, aligned=False)[:1], reference(target)[:1]) > SHARE


def marks_of(target: Target, mode: str) -> list[pytest.MarkDecorator]:
    """A whole model takes long to trace, and its compiled blocks say nearly as much: of most it is for `make slow`."""
    slow = mode == "compiled model" and target.name not in TRACED
    return [pytest.mark.slow] if slow or (MODES[mode].compiled and target.name in LIKE_OTHERS) else []


@pytest.mark.parametrize(
    ("target", "mode"),
    [
        pytest.param(target, mode, id=f"{dashed(target.name)}-{dashed(mode)}", marks=marks_of(target, mode))
        for target in TARGETS
        for mode in MODES
    ],
)
def test_same_losses_and_gradients_as_by_hand(target, mode, cells):
    need(target)
    cells[target.name, mode] = cell = try_cell(target, MODES[mode])
    judge(cell, MODES[mode].tolerance)


@pytest.mark.parametrize("mode", DISTRIBUTED_MODES)
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=[] if target.name in SHARED else pytest.mark.slow, id=dashed(target.name))
        for target in TARGETS
    ],
)
def test_same_losses_and_gradients_in_two_processes(target, mode, distributed, cells):
    need(target)
    reports = [report[target.name, mode] for report in distributed]
    for rank, report in enumerate(reports):
        assert not isinstance(report, str), f"process {rank} of {WORLD}: {report}"
    cells[target.name, mode] = cell = max(reports, key=lambda report: (report.refusal, report.error))
    judge(cell, DISTRIBUTED_MODES[mode].tolerance)


def test_table_has_every_target_and_mode():
    modes, rows = table.read(table.PATH)
    assert modes == ALL_MODES
    assert list(rows) == [target.name for target in TARGETS]
    assert all(len(row) == len(modes) and all(row) for row in rows.values())
