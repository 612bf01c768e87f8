"""SRA in the trainer: what its teacher sees, what is learnt, kept and resumed."""

from __future__ import annotations

import pytest
import torch

from layersync_kernels.errors import CheckpointError, ConfigError
from layersync_kernels.sit.batch import Condition
from layersync_kernels.sit.checkpoints.local import list_checkpoints
from layersync_kernels.sit.checkpoints.weights import load_weights
from layersync_kernels.sit.config.loss import AlignConfig, AlignScheduleConfig, LayerSyncConfig
from layersync_kernels.sit.diffusion.transport import Transport
from layersync_kernels.sit.models.embedders import keep_dropped
from layersync_kernels.sit.models.sit import SiT
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.runlog import read_records
from layersync_kernels.sit.training.terms.sra import SraTerm, as_seen

from . import tiny
from .tiny import equal, saved

SRA = AlignConfig("sra", align_block=1, align_teacher_block=3)
LOG = {"log_every": 1, "sample_every": 0, "checkpoint_every": 5}


def tiny_config(**groups):
    return tiny.tiny_config(**{"align": SRA, "log": LOG, "layersync": LayerSyncConfig(("off",))} | groups)


def trained(run_dir, steps=10, *, resume=False, **groups):
    trainer = Trainer(tiny_config(**groups | {"optim": {"steps": steps, "batch_size": 6}}), tiny.tiny_data())
    trainer.run_dir = run_dir
    if resume:
        trainer.load(list_checkpoints(run_dir)[-1])
    trainer.fit()
    return saved(run_dir)


def test_the_average_sees_the_same_noise_later_and_the_labels_that_the_model_saw(monkeypatch):
    config = tiny_config(optim={"batch_size": 12, "accumulate": 2}, model={"class_dropout": 0.5}, data={"flip": False})
    trainer = Trainer(config, tiny.tiny_data())
    calls = {"model": [], "ema": [], "labels": [], "drawn": []}

    def spy(name, module):
        forward = module.forward

        def spied(x, t, y, capture=()):
            calls[name].append((x, t, y, tuple(capture), torch.is_grad_enabled()))
            return forward(x, t, y, capture)

        monkeypatch.setattr(module, "forward", spied)

    spy("model", trainer.model)
    spy("ema", trainer.ema)
    table = trainer.model.y_embedder.embedding_table
    table.register_forward_hook(lambda module, inputs, output: calls["labels"].append(inputs[0]))
    losses = Transport.training_losses

    def training_losses(self, model, x, *arguments, **keywords):
        output = losses(self, model, x, *arguments, **keywords)
        calls["drawn"].append((x, output["x0"]))
        return output

    monkeypatch.setattr(Transport, "training_losses", training_losses)
    trainer.step(next(trainer.batches()))
    trainer.step(next(trainer.batches()))
    assert [len(found) for found in calls.values()] == [4, 4, 4, 4]
    gaps, dropped = [], 0
    for (_, t, y, _, _), (x_ema, t_ema, y_ema, capture, grad), labels, (data, noise) in zip(
        *calls.values(), strict=True
    ):
        assert (capture, grad) == ((3,), False)
        time = t_ema.view(-1, 1, 1, 1)
        torch.testing.assert_close(x_ema, time * data + (1 - time) * noise)
        assert torch.equal(y_ema, labels)
        dropped += int((labels != y).sum())
        gaps.append(torch.where(t_ema < 1, t_ema - t, 0.1))
    gaps = torch.stack(gaps)
    assert 0 < dropped < 24
    assert (gaps >= 0).all()
    assert (gaps <= 0.2 + 1e-6).all()
    assert (gaps.std(1) > 0.02).all()  # each sample has its own
    assert len(torch.unique(gaps[:, 0])) == 4  # and so has each pass of each step
    assert not trainer.ema.training


def test_a_block_learns_from_the_average_and_goes_on_bit_by_bit(tmp_path):
    heavy = {"align": AlignConfig("sra", align_block=1, align_teacher_block=3, align_weight=1.0)}
    whole = trained(tmp_path / "whole", 20, **heavy)
    records = read_records(tmp_path / "whole")
    losses = [record["sra_loss"] for record in records]
    assert max(losses[-3:]) < min(losses[:3]) - 0.1
    assert records[-1]["cosine"].keys() == {"1:ema.3"}
    assert records[-1]["cosine"]["1:ema.3"] == pytest.approx(-losses[-1], rel=1e-5)
    assert all(0 < record["teacher_share"] < 1 for record in records)
    trained(tmp_path / "parts", 10, **heavy)
    torch.manual_seed(12345)
    parts = trained(tmp_path / "parts", 20, resume=True, **heavy)
    assert whole.keys() == parts.keys() == {"model", "ema", "optimizer", "rng", "projector"}
    assert all(equal(whole[stem], parts[stem]) for stem in whole)


def test_other_random_numbers_stay_and_the_model_file_is_that_of_a_plain_run(tmp_path):
    with_it = trained(tmp_path / "with", 5, align=AlignConfig("sra", align_rows="smooth_l1"))
    without = trained(tmp_path / "without", 5, align=AlignConfig())
    assert equal(with_it["rng"], without["rng"])
    assert with_it["model"].keys() == without["model"].keys()
    assert not equal(with_it["model"], without["model"])
    assert load_weights(list_checkpoints(tmp_path / "with")[-1]).tensors.keys() == without["ema"].keys()
    with pytest.raises(CheckpointError, match="step_00000005 was trained without SRA; resume it with --align off"):
        trained(tmp_path / "without", 6, resume=True)


def test_the_average_rests_in_the_steps_without_the_term(monkeypatch):
    trainer = Trainer(tiny_config(align=AlignConfig("sra", align_when=AlignScheduleConfig(every=2))), tiny.tiny_data())
    steps, forward = [], trainer.ema.forward
    monkeypatch.setattr(trainer.ema, "forward", lambda *a, **k: steps.append(trainer.steps_done) or forward(*a, **k))
    trainer.advance(4)
    assert steps == [0, 2]


def test_texts_that_the_model_left_out_are_left_out_for_the_average():
    model = SiT((6,), 1, 3, 8, 2, 2, condition="cross", text_width=5, class_dropout_prob=0.5).train()
    keep_dropped(model)
    text, x, t = torch.randn(16, 4, 5), torch.randn(16, 3, 6), torch.rand(16)
    for lengths in (None, torch.arange(16) % 4 + 1):
        condition = Condition(torch.zeros(16, dtype=torch.long), text=text, text_lengths=lengths)
        torch.manual_seed(3)
        model(x, t, **condition.keywords())
        torch.manual_seed(3)
        dropped = torch.rand(16) < 0.5
        expected = torch.where(dropped, 0, torch.full((16,), 4) if lengths is None else lengths)
        assert torch.equal(as_seen(model, condition).text_lengths, expected)


def test_defaults_are_those_of_the_paper():
    term = Trainer(tiny_config(align=AlignConfig("sra"), model={"depth": 28}), tiny.tiny_data()).term(SraTerm)
    assert (term.module.layers, term.block, term.gap, term.module.weights) == ((8,), 20, 0.2, (0.5,))


@pytest.mark.parametrize(
    ("align", "message"),
    [
        (AlignConfig("sra", align_block=4), "--align-block 4: the model has blocks 1 to 3"),
        (AlignConfig("sra", align_block=2, align_teacher_block=1), "--align-teacher-block 1: .*expected 2 to 3"),
        (AlignConfig("sra", align_teacher_block=4), "--align-teacher-block 4: .*expected 1 to 3"),
        (AlignConfig("sra", align_gap=1.5), r"--align-gap 1.5: expected a time in \[0, 1\]"),
        (AlignConfig("sra", teacher="dinov2-vitb14"), "--align repa or irepa only, which is sra"),
        (AlignConfig("sra", align_when=AlignScheduleConfig("linear")), "--align sra: .*stop_step"),
    ],
)
def test_settings_that_clash_are_refused(align, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(tiny_config(align=align), tiny.tiny_data())
