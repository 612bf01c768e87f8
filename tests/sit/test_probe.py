from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from layersync_kernels import cli, default_pair
from layersync_kernels.errors import CheckpointError, ConfigError, DataError, UserError
from layersync_kernels.sit.checkpoints.local import save_checkpoint
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.config.io import save_config
from layersync_kernels.sit.config.model import ModelConfig
from layersync_kernels.sit.config.run import CONFIG, TrainConfig
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.diffusion.interpolants import LinearInterpolant
from layersync_kernels.sit.evaluation.probes import linear_cka, linear_probe
from layersync_kernels.sit.models.sit import SiT
from layersync_kernels.sit.spec import SampleSpec
from layersync_kernels.sit.studies.pair.config import ProbeCommand
from layersync_kernels.sit.studies.pair.measure import States
from layersync_kernels.sit.studies.pair.plots import save_probe
from layersync_kernels.sit.studies.pair.report import propose_pair, teacher_range
from layersync_kernels.sit.studies.pair.run import analyse, measure, probe

from .tiny import run_state

PAIRS = Path(__file__).parents[2] / "docs" / "integrations" / "pairs.md"


def make_run(tmp_path, *, depth=4, classes=3, class_dropout=0.1, alive=True):
    """A run of a small SiT on 40 samples whose brightness tells the class."""
    labels = np.arange(40) % classes
    noise = np.random.default_rng(0).integers(0, 40, (40, 4, 4))
    np.savez(tmp_path / "data.npz", images=(60 * labels[:, None, None] + noise).astype(np.uint8), labels=labels)
    size = {"hidden_size": 16, "depth": depth, "num_heads": 2}
    model = SiT(4, 2, 1, num_classes=classes, class_dropout_prob=class_dropout, **size)
    if alive:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    config = TrainConfig(
        data=DataConfig(data=str(tmp_path / "data.npz")),
        model=ModelConfig("SiT-P/2", class_dropout=class_dropout, **size),
    )
    run = tmp_path / "run"
    run.mkdir()
    save_config(config, run / CONFIG)
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    save_checkpoint(run, 5, {"model": zeros, "ema": model.state_dict()}, run_state(5, classes))
    return run


def command(run, **changes):
    return ProbeCommand(run, data=DataConfig(data=str(run.parent / "data.npz")), precision="fp32", **changes)


@pytest.fixture
def _no_picture(monkeypatch):
    """Most of a probe's time at this size goes into drawing."""
    monkeypatch.setattr("layersync_kernels.sit.studies.pair.run.save_probe", lambda reports, path: path)


# What is measured


class Staged(nn.Module):
    """Block 3 of 4 puts out the label, which is in the brightness of the sample; the others random numbers."""

    depth, num_classes = 4, 3

    def __init__(self, null_label=True):
        super().__init__()
        self.guidable = null_label
        self.told = set()

    def without(self, condition):
        return dataclasses.replace(condition, labels=torch.full_like(condition.labels, self.num_classes))

    def forward(self, x, t, y, capture):
        self.told |= set(y.tolist())
        states = {block: torch.randn(len(x), 5, 8) for block in capture}
        states[3][:, :, 0] += 50 * x.mean((1, 2, 3))[:, None].round()
        states[3][:, :, 1] += 50 * x.mean((1, 2, 3))[:, None].round().square()
        return x, states


def staged_data(count=400):
    labels = torch.arange(count) % 3
    samples = (labels - 1).float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    return MemorySet(
        spec=SampleSpec(1, (4, 4)), num_classes=3, class_names=["a", "b", "c"], samples=samples, labels=labels
    )


def run_staged(model, **changes):
    options = {"samples": 400, "times": (1.0,), "batch_size": 64, "seed": 0, "device": torch.device("cpu")}
    return measure(model, LinearInterpolant(), staged_data(), **(options | changes))


def test_probe_finds_the_one_block_that_holds_the_label():
    report = analyse(run_staged(Staged()), times=(1.0,), null_label=True, checkpoint="staged")
    assert report.accuracy.mean[2] == 1.0
    assert max(report.accuracy.mean[b] for b in (0, 1, 3)) < 0.45
    assert report.accuracy.chance == pytest.approx(1 / 3, abs=0.05)
    assert report.accuracy.standard_error[2] == 0
    assert report.accuracy.standard_error[0] == pytest.approx((0.33 * 0.67 / 200) ** 0.5, rel=0.15)
    assert report.pair == (1, 3)
    assert "block 3 has the best probe" in report.reason


def test_model_is_never_told_the_label():
    model = Staged()
    run_staged(model)
    assert model.told == {3}  # the null label


def test_model_without_null_label_is_told_class_0_and_the_report_says_so():
    model = Staged(null_label=False)
    report = analyse(run_staged(model), times=(1.0,), null_label=False, checkpoint="staged")
    assert model.told == {0}
    assert any("no null label" in note for note in report.notes)


def test_no_sample_is_taken_twice():
    states = run_staged(Staged(), samples=1000, batch_size=150)
    assert states.features.shape == (1, 4, 400, 8)
    assert states.labels.bincount().tolist() == [134, 133, 133]


@pytest.mark.parametrize("kernels", ["fused", "eager"])
def test_cosine_and_features_are_those_of_the_blocks(kernels):
    """Against every sample at once, and so whatever the batch size."""
    model = SiT(4, 2, 1, hidden_size=16, depth=3, num_heads=2, num_classes=3, kernels=kernels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval()
    data = MemorySet(
        spec=SampleSpec(1, (4, 4)),
        num_classes=3,
        class_names=["a", "b", "c"],
        samples=torch.randn(20, 1, 4, 4),
        labels=torch.arange(20) % 3,
    )
    options = {"samples": 20, "times": (0.3, 0.8), "seed": 1, "device": torch.device("cpu")}
    states = measure(model, LinearInterpolant(), data, batch_size=6, **options)
    batch = next(data.batches(20, seed=1))
    x0 = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(states.labels, batch.labels)
    expected = torch.zeros(2, 3, 3)
    for i, t in enumerate((0.3, 0.8)):
        x = t * batch.samples + (1 - t) * x0
        _, hidden = model(x, torch.full((20,), t), torch.full((20,), 3), capture=(1, 2, 3))
        for a in range(3):
            torch.testing.assert_close(states.features[i, a], hidden[a + 1].mean(1), rtol=1e-4, atol=1e-5)
            for b in range(3):
                expected[i, a, b] = torch.cosine_similarity(hidden[a + 1], hidden[b + 1], dim=-1).mean()
    torch.testing.assert_close(states.cosine.float(), expected, rtol=1e-4, atol=1e-5)


def test_cka_is_1_for_itself_and_blind_to_rotation_scale_and_shift():
    x = torch.randn(200, 6, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    other = torch.randn(200, 6, dtype=torch.float64)
    cka = linear_cka(torch.stack([x, 3 * x @ rotation + 5, other]))
    torch.testing.assert_close(cka[:2, :2], torch.ones(2, 2, dtype=torch.float64))
    assert cka[0, 2] < 0.1
    assert torch.equal(cka, cka.T)
    stretched = x * torch.tensor([10.0, 1, 1, 1, 1, 1])
    assert linear_cka(torch.stack([x, stretched]))[0, 1] < 0.9  # not to every linear map


def test_cka_equals_the_formula_of_the_gram_matrices():
    x, y = torch.randn(2, 30, 5, dtype=torch.float64)
    centre = torch.eye(30, dtype=torch.float64) - 1 / 30
    k, m = (centre @ z @ z.T @ centre for z in (x, y))
    expected = (k * m).sum() / (k.norm() * m.norm())
    torch.testing.assert_close(linear_cka(torch.stack([x, y]))[0, 1], expected)


def test_cka_with_a_constant_representation_is_0():
    assert linear_cka(torch.stack([torch.randn(9, 3), torch.ones(9, 3)]))[0, 1] == 0


def test_probe_standardises_and_regularises():
    """The label sits in one channel of tiny scale; with as many channels as samples, a fit without penalty is wild."""
    labels = torch.arange(200) % 2
    found = []
    for _ in range(3):
        features = torch.randn(200, 100)
        features[:, 7] = 1e-4 * (labels + 0.1 * torch.randn(200))
        found.append(linear_probe(features, labels, 100))
    assert torch.stack(found).double().mean() > 0.93


def test_constant_channels_do_not_disturb_the_probe():
    labels = torch.arange(40) % 2
    features = torch.stack([labels.float(), torch.full((40,), 0.1)], 1)
    assert linear_probe(features, labels, 20).all()


# The proposal


def scores(accuracies, count=1000):
    """Scores of `count` samples with exactly these accuracies; the better block is right wherever the worse is."""
    return torch.stack([(torch.arange(count) < round(count * a)).double() for a in accuracies])


def curve(depth, **peaks):
    return [peaks.get(f"b{block}", 0.5) for block in range(1, depth + 1)]


@pytest.mark.parametrize(
    ("depth", "peaks", "pair"),
    [
        (28, {"b20": 0.9}, (10, 20)),
        (28, {"b19": 0.9}, (10, 19)),  # half of 19, rounded up
        (28, {"b28": 0.9, "b23": 0.9, "b14": 0.8}, (7, 14)),  # the last fifth does not count
        (28, {"b3": 0.9, "b13": 0.9, "b22": 0.6}, (11, 22)),  # nor do the early ones
        (12, {"b9": 0.7}, (5, 9)),
        (4, {"b2": 0.9}, (1, 2)),
    ],
)
def test_clear_winner_becomes_the_teacher(depth, peaks, pair):
    proposed, reason = propose_pair(depth, scores(curve(depth, **peaks)))
    assert proposed == pair
    assert f"block {pair[1]} has the best probe" in reason


def test_best_default_teacher_keeps_the_published_pair():
    proposed, reason = propose_pair(24, scores(curve(24, b18=0.8)))
    assert proposed == (8, 18)
    assert "it is the default pair's teacher" in reason


def test_noise_keeps_the_default_pair_and_the_reason_says_so():
    noisy = (torch.rand(28, 1000) < 0.5).double()
    noisy[19] = (torch.rand(1000) < 0.52).double()
    proposed, reason = propose_pair(28, noisy)
    assert proposed == default_pair(28)
    assert "do not separate" in reason


def test_equal_blocks_keep_the_default_pair():
    for depth in (2, 3, 5, 6, 28):
        assert propose_pair(depth, scores(curve(depth)))[0] == default_pair(depth)


def test_difference_counts_from_two_standard_errors_on():
    """A lead of 1 in 10 samples over the same samples is clear with 1,000 of them, and not with 30."""
    accuracies = curve(28, b20=0.6)
    assert propose_pair(28, scores(accuracies))[0] == (10, 20)
    assert propose_pair(28, scores(accuracies, 30))[0] == default_pair(28)


def test_proposed_pairs_keep_their_distance_at_every_depth():
    for depth in range(2, 50):
        assert len(teacher_range(depth)) > 0
        for teacher in teacher_range(depth):
            accuracies = curve(depth, **{f"b{teacher}": 0.9})
            (student, proposed), _ = propose_pair(depth, scores(accuracies, 40))
            assert proposed == teacher
            assert 1 <= student < teacher <= depth
            if depth >= 6:
                assert student > depth / 5
                assert teacher <= depth - depth / 5
                assert teacher - student >= depth / 4


def test_student_with_the_better_probe_is_noted():
    labels = torch.arange(400) % 2
    features = torch.randn(1, 6, 400, 4)
    features[0, 1, :, 0] = labels.float()
    states = States(features, labels, torch.eye(6)[None], torch.ones(1, 6))
    report = analyse(states, times=(1.0,), null_label=True, checkpoint="x")
    assert report.pair == (2, 4)
    assert any("block 2, probes better than the teacher, block 4" in note for note in report.notes)


# The command


def test_run_is_probed_and_written(tmp_path, capsys):
    run = make_run(tmp_path)
    assert cli.main(["probe", str(run), "--device", "cpu", "--times", "0.4", "1", "--batch-size", "7"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(run / "probe.png")
    assert Image.open(run / "probe.png").size[0] > 1000
    content = json.loads((run / "probe.json").read_text())
    assert set(content) == {
        *("checkpoint", "depth", "samples", "held_out", "times", "accuracy", "neighbours", "effective_rank", "cosine"),
        *("cosine_per_time", "cka", "cka_per_time", "teacher", "pair", "reason", "notes"),
    }
    assert set(content["accuracy"]) == {"mean", "standard_error", "per_time", "chance"}
    assert content["checkpoint"] == str(run / "checkpoints" / "step_00000005")
    assert (content["depth"], content["samples"], content["held_out"]) == (4, 40, 20)
    assert content["times"] == [0.4, 1.0]
    for values in (
        content["accuracy"]["mean"],
        content["accuracy"]["per_time"][1],
        *content["cosine"],
        *content["cka"],
    ):
        assert len(values) == 4
    assert all(content[key][i][i] == pytest.approx(1, abs=1e-5) for key in ("cosine", "cka") for i in range(4))
    student, teacher = content["pair"]
    assert f"proposed: --layersync {student}:{teacher}" in captured.err
    assert "teacher" in captured.err
    assert not list(run.glob(".writing-*"))


@pytest.mark.usefixtures("_no_picture")
def test_probe_is_deterministic_and_out_is_followed(tmp_path):
    run = make_run(tmp_path)
    for name, batch_size in {"a": 40, "b": 40}.items():
        assert probe(command(run, out=tmp_path / name / "p.png", batch_size=batch_size)) == tmp_path / name / "p.png"
    assert (tmp_path / "a" / "p.json").read_text() == (tmp_path / "b" / "p.json").read_text()
    probe(command(run, out=tmp_path / "c.png", seed=1))
    assert (tmp_path / "c.json").read_text() != (tmp_path / "a" / "p.json").read_text()
    assert not (run / "probe.png").exists()


@pytest.mark.usefixtures("_no_picture")
def test_untrained_run_keeps_the_default_pair(tmp_path):
    """adaLN-Zero starts with every block the identity: all of them are equal."""
    run = make_run(tmp_path, depth=12, alive=False)
    probe(command(run))
    content = json.loads((run / "probe.json").read_text())
    assert content["pair"] == [4, 8]
    assert np.allclose(content["cosine"], 1, atol=1e-5)


def test_run_without_labels_gets_similarities_alone(tmp_path, capsys):
    run = make_run(tmp_path, classes=1, class_dropout=0.0)
    probe(command(run))
    content = json.loads((run / "probe.json").read_text())
    assert content["accuracy"] is None
    assert content["pair"] == list(default_pair(4))
    assert "without labels" in content["reason"]
    assert any("one class only" in note for note in content["notes"])
    assert len(content["cka"]) == 4
    assert Image.open(run / "probe.png").size[0] > 1000


@pytest.mark.usefixtures("_no_picture")
def test_few_samples_per_class_are_noted(tmp_path):
    run = make_run(tmp_path)
    probe(command(run))
    assert any("--samples 60" in note for note in json.loads((run / "probe.json").read_text())["notes"])


def content(depth, times=(0.5,)):
    """A report of one half of everything."""
    values, matrix = [[0.5] * depth] * len(times), [[0.5] * depth] * depth
    accuracy = {"mean": values[0], "standard_error": values[0], "per_time": values, "chance": 0.1}
    every = dict.fromkeys(("cosine", "cka"), matrix) | {f"{key}_per_time": [matrix] * 2 for key in ("cosine", "cka")}
    known = {"accuracy": accuracy, "neighbours": accuracy, "effective_rank": values, "teacher": None}
    return {"depth": depth, "pair": (1, 2), "times": list(times)} | known | every


@pytest.mark.parametrize("depth", [28, 6])
def test_picture_of_any_depth(tmp_path, depth):
    save_probe({"run": content(depth)}, tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").size[0] > 1500


def test_one_block_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="has 1 block; a pair needs a model of at least 2"):
        probe(command(make_run(tmp_path, depth=1)))


def test_run_without_checkpoint_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        probe(command(tmp_path / "empty"))


@pytest.mark.usefixtures("_no_picture")
def test_missing_data_asks_for_the_flag(tmp_path, capsys):
    run = make_run(tmp_path)
    (tmp_path / "data.npz").rename(tmp_path / "moved.npz")
    assert cli.main(["probe", str(run), "--device", "cpu"]) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "no data named" in err
    assert "give the data to probe with by --data" in err
    assert cli.main(["probe", str(run), "--device", "cpu", "--data", str(tmp_path / "moved.npz")]) == 0


def test_data_of_another_shape_or_too_few_samples_is_an_error(tmp_path):
    run = make_run(tmp_path)
    np.savez(tmp_path / "data.npz", images=np.zeros((40, 6, 6), np.uint8))
    with pytest.raises(DataError, match=r"samples of \(1, 6, 6\), the model was trained on \(1, 4, 4\).*--image-size"):
        probe(command(run))
    np.savez(tmp_path / "data.npz", images=np.zeros((7, 4, 4), np.uint8))
    with pytest.raises(DataError, match="7 samples; expected at least 8"):
        probe(command(run))


def test_flipped_bit_in_the_weights_stops_it(tmp_path):
    run = make_run(tmp_path)
    ema = run / "checkpoints" / "step_00000005" / "ema.safetensors"
    content = bytearray(ema.read_bytes())
    content[-100] ^= 1
    ema.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: it is damaged"):
        probe(command(run))
    assert not (run / "probe.json").exists()


def test_weights_that_diverged_are_reported(tmp_path):
    run = make_run(tmp_path)
    model = SiT(4, 2, 1, hidden_size=16, depth=4, num_heads=2, num_classes=3)
    broken = {name: torch.full_like(value, float("nan")) for name, value in model.state_dict().items()}
    save_checkpoint(run, 6, {"ema": broken}, run_state(6))
    with pytest.raises(CheckpointError, match="not finite"):
        probe(command(run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 7}, "--samples 7: expected at least 8"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"times": (0.5, 1.5)}, r"--times 0.5 1.5: expected numbers from 0 \(noise\) to 1"),
        ({"times": ()}, "--times"),
        ({"out": Path("p.json")}, "--out p.json: expected a .png"),
        ({"device": "cuda:77"}, "--device"),
    ],
)
def test_bad_probe_settings_are_explained(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        probe(command(make_run(tmp_path), **changes))


def test_documented_pairs_are_those_of_default_pair():
    rows = re.findall(r"^\| (\d+) \|.*?\| (\d+) \| (\d+) \|", PAIRS.read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(depth) for depth, _, _ in rows] == [6, 12, 24, 28, 30]
    assert [default_pair(int(depth)) for depth, _, _ in rows] == [(int(s), int(t)) for _, s, t in rows]
