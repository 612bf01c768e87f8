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

from layersync_kernels.errors import CheckpointError, ConfigError, TrainingDiverged
from layersync_kernels.functional import gram_alignment_loss
from layersync_kernels.sit.batch import Batch, Condition
from layersync_kernels.sit.checkpoints.local import list_checkpoints
from layersync_kernels.sit.config.loss import DispersiveConfig, DispersiveScheduleConfig, LayerSyncConfig
from layersync_kernels.sit.models.sit import SiT
from layersync_kernels.sit.training import Trainer
from layersync_kernels.sit.training.runlog import read_records
from layersync_kernels.sit.training.terms import TERMS
from layersync_kernels.sit.training.terms.base import LossTerm, Setting
from layersync_kernels.sit.training.terms.dispersive import DispersiveTerm

from .tiny import equal, saved, tiny_config, tiny_data

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
    return saved(run_dir)


@pytest.fixture
def relation_term(tmp_path):
    """The class of the guide's file, which is written as it stands there."""
    guide = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide.partition("## Add a loss term")[2].partition("\n## ")[0], re.S)
    (tmp_path / "relation.py").write_text(code)
    spec = importlib.util.spec_from_file_location("relation", tmp_path / "relation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RelationTerm


def seen_by(term, monkeypatch, *blocks):
    """The states of those blocks in each pass, as the term will see them."""
    seen = []
    loss = term.loss

    def spied(self, states, target, step):
        seen.append([states[block].detach() for block in blocks])
        return loss(self, states, target, step)

    monkeypatch.setattr(term, "loss", spied)
    return seen


def test_term_of_the_guide_trains_and_is_recorded(relation_term, tmp_path, monkeypatch):
    seen = seen_by(relation_term, monkeypatch, 1, 3)
    files = trained(tmp_path / "with", relation_term.build)
    without = trained(tmp_path / "without")
    assert equal(files["rng"], without["rng"])
    assert not equal(files["model"], without["model"])
    assert files.keys() == without.keys()  # it trains nothing of its own
    for number, record in enumerate(read_records(tmp_path / "with")):
        passes = seen[2 * number : 2 * number + 2]
        expected = sum(0.5 * float(gram_alignment_loss(*states)) for states in passes) / 2
        assert record["relation_loss"] == pytest.approx(expected, rel=1e-5)
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


# The dispersive loss


def dispersed(samples, temperature):
    """The published formula, in fp64, of samples (B, ...)."""
    rows = samples.double().flatten(1)
    return (-torch.cdist(rows, rows).square() / (rows.shape[1] * temperature)).exp().mean().log()


def test_samples_of_a_pass_disperse_and_are_recorded(tmp_path, monkeypatch):
    seen = seen_by(DispersiveTerm, monkeypatch, 2)
    config = DispersiveConfig(2, 0.25, 0.1, DispersiveScheduleConfig("linear", stop_step=4, every=2))
    with_it = trained(tmp_path / "with", dispersive=config)
    without = trained(tmp_path / "without")
    assert equal(with_it["rng"], without["rng"])
    assert not equal(with_it["model"], without["model"])
    records = read_records(tmp_path / "with")
    assert ["dispersive_loss" in record for record in records] == [True, False, True, False]
    assert len(seen) == 4
    for factor, record, passes in ((1, records[0], seen[:2]), (0.5, records[2], seen[2:])):
        expected = sum(0.25 * factor * float(dispersed(hidden, 0.1)) for (hidden,) in passes) / 2
        assert record["dispersive_loss"] == pytest.approx(expected, rel=1e-5)


def test_dispersing_samples_lowers_the_loss_and_goes_on_bit_by_bit(tmp_path):
    heavy = {"dispersive": DispersiveConfig("auto", dispersive_weight=20.0), "layersync": LayerSyncConfig(("off",))}
    whole = trained(tmp_path / "whole", steps=12, **heavy)
    losses = [record["dispersive_loss"] for record in read_records(tmp_path / "whole")]
    assert max(losses[-3:]) < min(losses[:3])
    trained(tmp_path / "parts", steps=6, **heavy)
    torch.manual_seed(12345)
    parts = trained(tmp_path / "parts", steps=12, resume=True, **heavy)
    assert whole.keys() == parts.keys() == {"model", "ema", "optimizer", "rng"}
    assert all(equal(whole[stem], parts[stem]) for stem in whole)


def test_samples_with_lengths_disperse_by_the_mean_of_the_tokens_that_are_there():
    model = SiT((8, 2), (2, 1), 3, 12, 3, 2, num_classes=2)  # eight tokens
    config = dataclasses.replace(CONFIG, dispersive=DispersiveConfig(1, 1.0, 0.2))
    term = DispersiveTerm.build(Setting(config, model, None, torch.device("cpu")))
    lengths = torch.tensor([8, 1, 4, 5, 3, 8])
    batch = Batch(torch.zeros(6, 3, 8, 2), Condition(torch.zeros(6), lengths), torch.arange(6))
    hidden = torch.randn(6, 8, 12)
    for number, target in enumerate(term.targets(batch, passes=2)):
        own, counts = hidden[3 * number :][:3], [8, 2, 4, 6, 4, 8][3 * number :][:3]
        means = torch.stack([sample[:count].mean(0) for sample, count in zip(own, counts, strict=True)])
        there = torch.arange(8) < torch.tensor(counts)[:, None]
        spoiled = own.masked_fill(~there[..., None], math.nan).requires_grad_()
        loss = term.loss({1: spoiled}, target, 0)
        torch.testing.assert_close(loss.double(), dispersed(means, 0.2), rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad(loss, spoiled)
        assert torch.equal(gradient.abs().sum(-1) > 0, there)


@pytest.mark.parametrize(
    ("dispersive", "message"),
    [
        (DispersiveConfig(5), "--dispersive 5: the model has blocks 1 to 4"),
        (DispersiveConfig(0), "--dispersive 0: the model has blocks 1 to 4"),
        (DispersiveConfig(1, dispersive_temperature=0.0), "--dispersive-temperature 0.0: expected a positive number"),
        (DispersiveConfig(1, dispersive_when=DispersiveScheduleConfig("cosine")), "--dispersive 1: .*stop_step"),
    ],
)
def test_bad_settings_of_the_dispersive_loss_are_explained(dispersive, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(dataclasses.replace(CONFIG, dispersive=dispersive), tiny_data())
