"""A further term of the loss takes one file: that of CONTRIBUTING.md, and one that trains a module."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from layersync_kernels.errors import CheckpointError, TrainingDiverged
from layersync_kernels.functional import dispersive_loss
from layersync_kernels.sit.checkpoints.local import list_checkpoints, read_tensors
from layersync_kernels.sit.config.loss import LayerSyncConfig
from layersync_kernels.sit.training import Trainer
from layersync_kernels.sit.training.runlog import read_records
from layersync_kernels.sit.training.terms import TERMS
from layersync_kernels.sit.training.terms.base import LossTerm

from .tiny import tiny_config, tiny_data

CONFIG = tiny_config(
    model={"depth": 4},
    optim={"steps": 4, "batch_size": 4, "accumulate": 2},
    log={"log_every": 1, "sample_every": 0, "checkpoint_every": 2},
)


def trained(run_dir, *terms, steps=4, resume=False, **changes):
    config = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, steps=steps), **changes)
    trainer = Trainer(config, tiny_data(), run_dir=run_dir, terms=(*TERMS, *terms))
    if resume:
        trainer.load(list_checkpoints(run_dir)[-1])
    trainer.fit()
    return {file.stem: read_tensors(file) for file in list_checkpoints(run_dir)[-1].glob("*.safetensors")}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def dispersive_term(tmp_path):
    """The class of the guide's file, which is written as it stands there."""
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide.partition("## Add a loss term")[2].partition("\n## ")[0], re.S)
    (tmp_path / "dispersive.py").write_text(code)
    spec = importlib.util.spec_from_file_location("dispersive", tmp_path / "dispersive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DispersiveTerm


def test_term_of_the_guide_trains_and_is_recorded(dispersive_term, tmp_path, monkeypatch):
    seen = []
    loss = dispersive_term.loss
    monkeypatch.setattr(
        dispersive_term,
        "loss",
        lambda self, states, target, step: seen.append(states[1].detach()) or loss(self, states, target, step),
    )
    files = trained(tmp_path / "with", dispersive_term.build)
    without = trained(tmp_path / "without")
    assert equal(files["rng"], without["rng"])
    assert not equal(files["model"], without["model"])
    assert files.keys() == without.keys()  # it trains nothing of its own
    for number, record in enumerate(read_records(tmp_path / "with")):
        passes = seen[2 * number : 2 * number + 2]
        expected = sum(0.25 * float(dispersive_loss(hidden)) for hidden in passes) / 2
        assert record["dispersive_loss"] == pytest.approx(expected, rel=1e-5)
        assert "align_loss" in record


class HeadTerm(LossTerm):
    """The labels from the mean token of a block, by a linear layer of its own; off in every other step."""

    name, file = "head", "classifier"

    def __init__(self, width, classes):
        self.module = nn.Linear(width, classes)

    @classmethod
    def build(cls, setting):
        return cls(setting.model.hidden_size, setting.data.num_classes)

    def active(self, step):
        return step % 2 == 0

    def captures(self, kernels):
        return (2,)

    def targets(self, batch, passes):
        yield from batch.labels.chunk(passes)

    def loss(self, states, target, step):
        self.logits = self.module(states[2].mean(1))
        return nn.functional.cross_entropy(self.logits, target)

    def metrics(self):
        return {"head_spread": self.logits.detach().std()}

    def facts(self):
        return {"head_size": 2.0}

    def cause(self, diverged):
        return "the head is broken" if diverged else None


def test_module_of_a_term_is_trained_saved_and_resumed(tmp_path):
    whole = trained(tmp_path / "whole", HeadTerm.build)
    trained(tmp_path / "parts", HeadTerm.build, steps=2)
    torch.manual_seed(12345)
    parts = trained(tmp_path / "parts", HeadTerm.build, resume=True)
    assert whole.keys() == {"model", "ema", "optimizer", "rng", "classifier"}
    assert all(equal(whole[stem], parts[stem]) for stem in whole)
    torch.manual_seed(CONFIG.seed)
    assert not equal(whole["classifier"], HeadTerm(16, 3).module.state_dict())
    assert {"classifier.weight.exp_avg", "classifier.bias.exp_avg"} <= whole["optimizer"].keys()
    assert equal(whole["rng"], trained(tmp_path / "without")["rng"])
    records = read_records(tmp_path / "whole")
    assert ["head_loss" in record for record in records] == ["head_spread" in record for record in records]
    assert ["head_loss" in record for record in records] == [True, False, True, False]
    assert all(record["head_size"] == 2 for record in records)


def test_checkpoint_without_the_term_is_refused(tmp_path):
    trained(tmp_path / "run", steps=2)
    with pytest.raises(CheckpointError, match="step_00000002 was trained without the term head"):
        trained(tmp_path / "run", HeadTerm.build, resume=True)


def test_term_that_knows_why_a_loss_is_not_finite_is_heard(tmp_path, monkeypatch):
    monkeypatch.setattr(HeadTerm, "loss", lambda self, states, target, step: states[2].sum() * math.nan)
    monkeypatch.setattr(HeadTerm, "metrics", lambda self: {})
    with pytest.raises(TrainingDiverged, match="not finite at step 1: the head is broken, or use --precision fp32"):
        trained(tmp_path / "run", HeadTerm.build)


def test_blocks_that_several_terms_want_are_captured_once(monkeypatch):
    layersync = LayerSyncConfig(layersync=("2:4",), teacher_grad=True)  # whose blocks are captured one by one
    trainer = Trainer(dataclasses.replace(CONFIG, layersync=layersync), tiny_data(), terms=(*TERMS, HeadTerm.build))
    asked = []
    forward = trainer.model.forward
    monkeypatch.setattr(
        trainer.model, "forward", lambda x, t, y, capture=(): asked.append(capture) or forward(x, t, y, capture)
    )
    trainer.step(next(trainer.batches()))
    assert asked == [[2, 4], [2, 4]]
