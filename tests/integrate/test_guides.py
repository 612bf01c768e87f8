"""The guides' code runs as printed, and aligns what they say: each page against the formula written out by hand."""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

import layersync_kernels
from layersync_kernels import LayerSync

from . import standins, targets

GUIDES = Path(__file__).parents[2] / "docs" / "integrations"
WITHOUT_CODE_OF_A_TRAINER = {"matrix.md", "pairs.md"}
OF_THE_LOSS_ALONE = "simpletuner.md"


@contextmanager
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def accelerator():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True)


def ddp_names(model: nn.Module) -> dict[str, Any]:
    """What the trainers of SiT, DiT and their forks have at hand."""
    return {
        "model": DistributedDataParallel(model),
        "ema": copy.deepcopy(model).requires_grad_(False),
        "update_ema": standins.update_ema,
        "opt": standins.sgd(model),
        "loader": standins.images(),
        "logger": logging.getLogger("guide"),
    }


def readme(_):
    model, transport = standins.SiT(depth=28), standins.Transport()

    def training_loss(model, batch):
        x, y = batch
        return transport.training_losses(model, x, {"y": y})["loss"].mean()

    return {
        "model": model,
        "optimizer": standins.sgd(model),
        "loader": standins.images(),
        "training_loss": training_loss,
    }


def sit(_):
    return ddp_names(standins.SiT(depth=28)) | {"transport": standins.Transport()}


def dit(_):
    return ddp_names(standins.SiT(depth=28)) | {"diffusion": standins.Diffusion(), "torch": torch}


def layersync(_):
    args = SimpleNamespace(encoder_depth=8, gt_encoder_depth=16, reg_weight=0.2)
    return ddp_names(standins.ForkedSiT(depth=28)) | {"transport": standins.ForkedTransport(), "args": args}


def repa(_):
    model = standins.ProjectedSiT(depth=28)
    return {
        "model": model,
        "optimizer": standins.sgd(model),
        "train_dataloader": [(x, y, [torch.randn(len(x), 16, 12)]) for x, y in standins.images()],
        "zs_tilde": [torch.randn(standins.BATCH, 16, 12)],
        "h8": torch.randn(standins.BATCH, 16, 32),
        "accelerator": accelerator(),
        "loss_fn": standins.repa_loss,
        "args": SimpleNamespace(proj_coeff=0.5),
    }


def lightningdit(by_hand):
    torch.compiler.reset()
    # The formula by hand cannot be used under reentrant checkpoints, which is why the guide takes mode="reentrant".
    model = standins.LightningDiT(depth=28, use_checkpoint=not by_hand)
    return ddp_names(model) | {
        "transport": standins.Transport(),
        "accelerator": accelerator(),
        "train_config": {"model": {"use_checkpoint": not by_hand}},
        "writer": SimpleNamespace(add_scalar=lambda *_: None, add_scalars=lambda *_: None),
    }


def motion(_):
    model = standins.MDM(layers=8)
    return {
        "self": standins.train_loop(model),
        "data": standins.motions(),
        "logger": standins.Logger("guide"),
    }


def diffsynth(_):
    model = standins.WanTrainingModule(depth=30)
    optimizer = standins.sgd(model)
    return {
        "model": model,
        "optimizer": optimizer,
        "dataloader": standins.videos(),
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "accelerator": accelerator(),
    }


TARGETS = {target.name: target for target in targets.TARGETS}
DIFFUSERS = {  # by the name in the guide: target, depths as the configurations call them, student, teacher
    "dit": ("DiT", {"num_layers": 28}, "transformer_blocks.7", "transformer_blocks.15"),
    "pixart": ("PixArt", {"num_layers": 28}, "transformer_blocks.7", "transformer_blocks.15"),
    "sd3": ("SD3", {"num_layers": 24}, "transformer_blocks.7", "transformer_blocks.17"),
    "flux": (
        "Flux",
        {"num_layers": 19, "num_single_layers": 38},
        "transformer_blocks.17",
        "single_transformer_blocks.18",
    ),
    "wan": ("Wan", {"num_layers": 30}, "blocks.8", "blocks.16"),
    "cogvideox": ("CogVideoX", {"num_layers": 30}, "transformer_blocks.8", "transformer_blocks.16"),
    "ltx": ("LTX", {"num_layers": 28}, "transformer_blocks.7", "transformer_blocks.15"),
    "stable_audio": ("Stable Audio", {"num_layers": 24}, "transformer_blocks.7", "transformer_blocks.17"),
}


def diffusers(_):
    peft = pytest.importorskip("peft")

    def deep(target, depths):
        model = target.make()
        return type(model).from_config(model.config, **depths)

    models = {name: deep(TARGETS[target], depths) for name, (target, depths, *_) in DIFFUSERS.items()}
    batches = [TARGETS["SD3"].batch(seed) for seed in range(standins.STEPS)]
    return models | {
        "torch": torch,
        "transformer": copy.deepcopy(models["sd3"]),
        "train_dataloader": [(batch.inputs, batch.goal) for batch in batches],
        "LoraConfig": peft.LoraConfig,
        "accelerator": accelerator(),
    }


def check_diffusers(names):
    for name, (target, _, student, teacher) in DIFFUSERS.items():
        by_hand = ByHand(Guide(diffusers, student, teacher, tokens=TARGETS[target].tokens), names[name])
        TARGETS[target].task_loss(names[name], TARGETS[target].batch(0))
        torch.testing.assert_close(names[f"{name}_sync"].loss(), by_hand.loss(), rtol=1e-5, atol=1e-6)


def check_fused(names):
    assert len(names["fused"].replaced) == 28
    assert not names["fused"].left


def check_repa(names):
    check_fused(names)
    assert names["align"].cosine["8"].isfinite()
    assert names["proj_loss_mean"] == 0
    assert names["repa"].value != 0
    (z,), (z_tilde,) = names["zs"], names["zs_tilde"]
    by_sample = torch.stack([alignment(own, target) for own, target in zip(z_tilde, z, strict=True)])
    torch.testing.assert_close(names["proj_loss"], by_sample.mean())


@dataclass(frozen=True)
class Guide:
    """A page: the names that its code takes as given, and what it should align, said once more."""

    prepare: Callable[[bool], dict[str, Any]]  # True for the formula by hand
    student: str = "blocks.7"  # module paths count from 0
    teacher: str = "blocks.15"
    weight: float = 0.2
    tokens: Callable[[Any], torch.Tensor] = lambda output: output
    mask: torch.Tensor | None = None
    libraries: tuple[str, ...] = ("timm",)
    ddp: bool = False
    tolerance: float = 0.01  # of the alignment's gradient
    check: Callable[[dict[str, Any]], None] = lambda names: None


PAGES = {
    "README.md": Guide(readme),
    "sit.md": Guide(sit, ddp=True, check=check_fused),
    "dit.md": Guide(dit, ddp=True, check=check_fused),
    "layersync.md": Guide(layersync, ddp=True),
    "repa.md": Guide(repa, libraries=("timm", "accelerate"), check=check_repa),
    "lightningdit.md": Guide(lightningdit, libraries=("timm", "accelerate"), ddp=True, check=check_fused),
    "motion-diffusion-model.md": Guide(
        motion,
        student="seqTransEncoder.layers.1",
        teacher="seqTransEncoder.layers.4",
        tokens=lambda output: output[1:].transpose(0, 1),
        mask=standins.FRAMES,
        libraries=(),
    ),
    "diffsynth-wan.md": Guide(
        diffsynth,
        student="pipe.dit.blocks.8",
        teacher="pipe.dit.blocks.16",
        weight=0.002,
        libraries=("timm", "accelerate", "peft"),
    ),
    "diffusers.md": Guide(
        diffusers,
        student="transformer_blocks.7",
        teacher="transformer_blocks.17",
        weight=0.002,
        tokens=lambda output: output[1],
        libraries=("diffusers", "accelerate", "peft"),
        check=check_diffusers,
    ),
    "plain-loop.md": Guide(
        lambda _: {}, student="blocks.3", teacher="blocks.7", weight=0.3, libraries=(), tolerance=0.05
    ),
}


def code(page: str, language: str) -> list[tuple[int, str]]:
    """The page's blocks of a language, each with its line number."""
    text = (GUIDES / page).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def alignment(student, teacher, mask=None):
    cosine = (F.normalize(student.float(), dim=-1) * F.normalize(teacher.detach().float(), dim=-1)).sum(-1)
    return -(cosine if mask is None else cosine[mask]).mean()


class ByHand:
    """Stands in for LayerSync: what a page should align comes from here, not from the arguments on the page."""

    def __init__(self, guide: Guide, model: nn.Module) -> None:
        self.guide, self.weight, self.outputs = guide, guide.weight, {}
        for path, module in model.named_modules():
            for end in (guide.student, guide.teacher):
                if path.removeprefix("module.") == end:
                    module.register_forward_hook(lambda module, args, output, end=end: self.keep(end, output))

    def keep(self, end, output):
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:  # not a checkpoint's second run
            self.outputs[end] = output

    def loss(self, **_):
        tokens = [self.guide.tokens(self.outputs.pop(end)) for end in (self.guide.student, self.guide.teacher)]
        loss = alignment(*tokens, self.guide.mask)
        self.value = self.weight * loss.detach()
        numbers = [int(end.rpartition(".")[2]) + 1 for end in (self.guide.student, self.guide.teacher)]
        self.cosine = {"{}:{}".format(*numbers): -loss.detach()}
        return self.weight * loss

    def remove(self):
        pass


@dataclass
class Run:
    """What came of a page's code."""

    names: dict[str, Any]
    values: list[float]
    gradients: list[dict[str, torch.Tensor]]  # of each optimiser step


def execute(page: str, guide: Guide, make: Callable[..., Any], by_hand: bool) -> Run:
    made: list[tuple[Any, nn.Module, set[str]]] = []
    run = Run({}, [], [])

    def record_sync(model, *args, **kwargs):
        sync = make(model, *args, **kwargs)
        made.append((sync, model, set(model.state_dict())))
        return sync

    def record_step(optimizer, args, kwargs):
        sync, model, _ = made[0]
        names = {id(parameter): name.removeprefix("module.") for name, parameter in model.named_parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        run.gradients.append({names[id(p)]: p.grad.clone() for p in parameters})
        run.values.append(float(sync.value))

    torch.manual_seed(0)
    run.names = guide.prepare(by_hand)
    torch.manual_seed(1)
    handle = register_optimizer_step_pre_hook(record_step)
    undone = torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=False)  # a guide sets it
    try:
        with undone, pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(layersync_kernels, "LayerSync", record_sync)
            for line, block in code(page, "python"):
                exec(compile("\n" * line + block, str(GUIDES / page), "exec"), run.names)
    finally:
        handle.remove()
    _, model, keys = made[0]
    assert set(model.state_dict()) == keys
    return run


def past_its_stop_step(model, *args, **kwargs):
    sync = LayerSync(model, *args, **kwargs | {"stop_step": 0})
    sync.step = 0
    return sync


def distance(one: Run, other: Run, of: str = "") -> float:
    pairs = zip(one.gradients, other.gradients, strict=True)
    parts = [(a[name] - b[name]).square().sum() for a, b in pairs for name in b if name.startswith(of)]
    return float(torch.stack(parts).sum().sqrt())


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_guide_runs_and_aligns_the_blocks_that_it_names(page):
    guide = PAGES[page]
    for library in guide.libraries:
        pytest.importorskip(library)
    with process_group() if guide.ddp else nullcontext():
        run = execute(page, guide, LayerSync, False)
        guide.check(run.names)

        hand = execute(page, guide, lambda model, *_, **__: ByHand(guide, model), True)
        off = execute(page, guide, past_its_stop_step, False)  # what a page logs is there then too
    assert len(run.gradients) == standins.STEPS
    assert off.values == [0.0] * standins.STEPS
    assert run.values == pytest.approx(hand.values, rel=max(1e-5, guide.tolerance / 10))
    assert distance(off, hand, f"{guide.student}.") > 0
    assert distance(run, hand) < guide.tolerance * distance(off, hand)


def test_the_code_for_simpletuner_is_its_formula():
    weight, states = 0.2, [torch.randn(2, 3, 4, 8, requires_grad=True) for _ in range(2)]
    given = SimpleNamespace(weight=weight, _flatten_tokens=lambda hidden: hidden.flatten(1, -2))
    names = {"self": given, "student": states[0], "teacher": states[1]}
    for _, block in code(OF_THE_LOSS_ALONE, "python"):
        exec(block, names)
    expected = alignment(*states)
    torch.testing.assert_close(names["loss"], weight * expected)
    torch.testing.assert_close(names["similarity_mean"], -expected.detach())
    own, by_hand = (torch.autograd.grad(loss, states, allow_unused=True) for loss in (names["loss"], weight * expected))
    torch.testing.assert_close(own[0], by_hand[0])
    assert own[1] is None  # the teacher


@pytest.mark.parametrize("page", [*PAGES, OF_THE_LOSS_ALONE])
def test_every_line_that_a_diff_adds_is_executed(page):
    executed = {line.split("  # ")[0].strip() for _, block in code(page, "python") for line in block.splitlines()}
    diffs = [line for _, diff in code(page, "diff") for line in diff.splitlines()]
    added = [line[1:].strip() for line in diffs if re.match(r"\+(?!\+\+ )", line)]
    assert not [line for line in added if line not in executed]
    assert added or page in ("README.md", "plain-loop.md")


def test_every_page_is_run_and_every_link_leads_somewhere():
    pages = {path.name for path in GUIDES.glob("*.md")}
    assert pages - WITHOUT_CODE_OF_A_TRAINER == {*PAGES, OF_THE_LOSS_ALONE}
    for page in pages:
        links = re.findall(r"\]\(([^)#:]+)\)", (GUIDES / page).read_text(encoding="utf-8"))
        assert not [link for link in links if not (GUIDES / link).exists()], page
