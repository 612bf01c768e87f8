from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from layersync_kernels import cli
from layersync_kernels.errors import CheckpointError, ConfigError, DataError, TeacherError
from layersync_kernels.sit.checkpoints.local import read_tensors
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.config.loss import AlignScheduleConfig
from layersync_kernels.sit.config.model import ModelConfig
from layersync_kernels.sit.config.optim import OptimConfig
from layersync_kernels.sit.config.run import LogConfig, TrainConfig
from layersync_kernels.sit.config.sampling import SamplingConfig
from layersync_kernels.sit.evaluation.frechet import Gaussian, frechet_distance
from layersync_kernels.sit.evaluation.networks import Network, Seen
from layersync_kernels.sit.studies.compare import run as compare_module
from layersync_kernels.sit.studies.compare.command import compare, prepare
from layersync_kernels.sit.studies.compare.config import CompareCommand, CompareConfig, load_sets
from layersync_kernels.sit.studies.compare.memory import measure_memory
from layersync_kernels.sit.studies.compare.report import markdown
from layersync_kernels.sit.studies.compare.run import Comparison
from layersync_kernels.sit.studies.compare.statistics import first_at
from layersync_kernels.sit.studies.compare.summary import summarise, value_at
from layersync_kernels.sit.training.loop import Trainer


class Pixels(Network):
    name = identity = "pixels"

    def see(self, arrays):
        return Seen({"features": torch.from_numpy(arrays["arr_0"]).flatten(1) / 127.5})


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two methods, two seeds, six steps, on 60 samples of 4x4; the judging network looks at the pixels."""
    monkeypatch.setattr(compare_module, "load_network", lambda name, kind, device, **_: Pixels())
    monkeypatch.setattr(compare_module, "measure_memory", lambda config, run: 3_000_000)
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(60) % 3)
    train = TrainConfig(
        data=DataConfig(data=str(tmp_path / "data.npz"), flip=True),
        model=ModelConfig("SiT-P/2", hidden_size=16, depth=3, num_heads=2, class_dropout=0.3),
        optim=OptimConfig(steps=6, batch_size=4, lr=1e-2, ema_decay=0.5),
        sampling=SamplingConfig(solver="euler", sampling_steps=3),
        log=LogConfig(checkpoint_every=2),
        device="cpu",
        precision="fp32",
    )
    return CompareConfig(
        train=train,
        methods=("vanilla", "layersync"),
        seeds=2,
        marks=2,
        held_out=20,
        samples=20,
        reference=40,
        frechet_every=1,
        pilot=0.0,
        probe_samples=0,
    )


def qualities(out):
    runs = json.loads((out / "report.json").read_text())["runs"]
    keys = ("step", "validation_loss", "frechet")
    return {(run["arm"], run["seed"]): [[mark[key] for key in keys] for mark in run["marks"]] for run in runs}


class StopAt:
    """A request to stop that comes when it is asked for the n-th time."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self):
        self.left -= 1
        return self.left < 0


def test_stopped_and_resumed_comparison_reports_the_same(config, tmp_path, monkeypatch):
    whole, parts, save = tmp_path / "whole", tmp_path / "parts", Trainer.save
    compare(CompareCommand(config, whole))
    prepare(config, parts)
    for calls in (3, 17, 12):  # between runs, and between two marks
        assert not Comparison(config, parts).train(StopAt(calls))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", lambda self: kill() if self.steps_done == 3 else save(self))  # but measured
        with pytest.raises(RuntimeError, match="killed"):
            Comparison(config, parts).train(lambda: False)
    files = parts.glob("*/*/marks.json")
    assert sum(len(json.loads(file.read_text())) for file in files) == 1 + sum(
        len(run.marks) for run in read(config, parts)
    )
    assert cli.main(["compare", "--out", str(parts), "--resume"]) == 0
    assert qualities(parts) == qualities(whole)
    assert qualities(whole)["vanilla", 0] != qualities(whole)["vanilla", 1]
    run = read(config, parts)[-1]
    assert Comparison(config, parts)._open(run).steps_done == 6  # not from the start again, which only costs time
    trainer = Trainer(run.config, Comparison(config, parts).train_set)
    trainer.advance(6)
    ema = read_tensors(run.folder / "checkpoints/step_00000006/ema.safetensors")
    assert all(torch.equal(ema[name], tensor) for name, tensor in trainer.ema.state_dict().items())


def read(config, out):
    runs = Comparison(config, out).runs
    for run in runs:
        run.read()
    return runs


def test_methods_take_turns(config, tmp_path):
    turns = [(run.seed, number, run.arm) for run, number in Comparison(config, tmp_path)._turns()]
    assert turns[:4] == [(0, 0, "vanilla"), (0, 0, "layersync"), (0, 1, "layersync"), (0, 1, "vanilla")]


def kill(*_):
    raise RuntimeError("killed")


def test_methods_start_alike_and_draw_the_same_numbers(config, tmp_path, capsys):
    """A projector or a teacher that takes random numbers would give each method other noise.

    Eight steps: at first all gates are 0 and the blocks of a pair alike, so that their loss has no gradient.
    """
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "hubconf.py").write_text("import torch\ndef tiny(pretrained):\n    return torch.nn.Conv2d(3, 8, 2, 2)\n")
    align = dataclasses.replace(config.train.align, teacher=f"hub/{teacher}:tiny", teacher_size=4)
    train = dataclasses.replace(config.train, align=align, optim=dataclasses.replace(config.train.optim, steps=8))
    methods = ("vanilla", "layersync", "repa", "both", "dispersive")
    config = dataclasses.replace(config, train=train, methods=methods, seeds=1, marks=1)
    out = tmp_path / "out"
    compare(CompareCommand(config, out))
    marks = qualities(out)
    assert len({tuple(marks[method, 0][0]) for method in methods}) == 1
    assert len({tuple(marks[method, 0][1]) for method in methods}) == len(methods)
    first, *others = (read_tensors(out / m / "seed-0/checkpoints/step_00000008/rng.safetensors") for m in methods)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    text = (out / "report.md").read_text()
    for method in methods:
        assert f"| {method} | 8 |" in text
    assert "One seed: there is no spread" in text
    assert "±" not in text
    assert Image.open(out / "report.png").size[0] > 1000


def replaced(config, **groups):
    """The config with changes in groups of its `train`, and with others of its own."""
    own = {name: value for name, value in groups.items() if not isinstance(value, dict)}
    train = {
        name: dataclasses.replace(getattr(config.train, name), **changes)
        for name, changes in groups.items()
        if isinstance(changes, dict)
    }
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train), **own)


def test_400_samples_are_compared_by_default(config, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (400, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(400) % 3)
    config = replaced(config, held_out=CompareConfig().held_out, seeds=1, marks=1, optim={"steps": 2})
    report = compare(CompareCommand(config, tmp_path / "out")).read_text()
    assert "360 samples of (1, 4, 4)" in report
    assert "without alignment on 40 samples" in report
    assert "40 of the training set" in report  # the reference
    assert "20 held-out ones are at" in report  # as many as are drawn


@pytest.mark.parametrize(
    ("count", "expected"),
    [(2, None), (3, 2), (19, 2), (20, 2), (400, 40), (10_009, 1000), (10_010, 1000), (20_000, 1000)],
)
def test_a_tenth_of_the_data_is_held_out_and_at_most_1000(config, tmp_path, count, expected):
    np.savez(tmp_path / "data.npz", images=np.zeros((count, 1, 1), np.uint8))
    config = replaced(config, held_out=None)
    if expected is None:
        with pytest.raises(ConfigError, match="the data has 2 samples"):
            load_sets(config, torch.device("cpu"))
        return
    train, held_out = load_sets(config, torch.device("cpu"))
    assert (len(train), len(held_out)) == (count - expected, expected)


def test_held_out_samples_of_a_file_of_their_own_are_1000_by_default(config, tmp_path):
    np.savez(tmp_path / "validation.npz", images=np.zeros((1200, 4, 4), np.uint8))
    own = replaced(config, held_out=None, validation=tmp_path / "validation.npz")
    comparison = Comparison(own, tmp_path / "out")
    assert (len(comparison.train_set), len(comparison.held_out), comparison.held_out_samples) == (60, 1200, 1000)
    assert Comparison(replaced(own, held_out=30), tmp_path / "out").held_out_samples == 30


def test_one_held_out_sample_has_no_frechet_distance(config, tmp_path):
    with pytest.raises(ConfigError, match="needs 2 held-out samples"):
        Comparison(replaced(config, held_out=1), tmp_path / "out")
    assert Comparison(replaced(config, held_out=1, quality_network="none"), tmp_path / "out").held_out_samples == 1


def missing_network(name, kind, device, **options):
    raise TeacherError(f"--features {name}: no such network")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"held_out": 60}, ConfigError, "--held-out 60: the data has 60 samples"),
        ({"data": {"data": "nothing.npz"}}, DataError, r"nothing\.npz"),
        ({"model": {"model": "nonsense"}}, ConfigError, "nonsense"),
        ({"methods": ("vanilla", "repa"), "align": {"teacher": "hub/nowhere:net"}}, TeacherError, "nowhere"),
        ({"dispersive": {"dispersive": 2}}, ConfigError, "--dispersive is in none of the --methods"),
        ({"methods": ("vanilla", "dispersive"), "dispersive": {"dispersive": 4}}, ConfigError, "has blocks 1 to 3"),
        ({"quality_network": "nonsense"}, TeacherError, "--quality-network nonsense: no such network; or leave the"),
        ({"samples": 16}, ConfigError, "16 samples and 40 real ones for 16 dimensions: more are needed, at least 17"),
        ({"reference": 16}, ConfigError, "20 samples and 16 real ones for 16 dimensions"),
    ],
)
def test_settings_that_fail_write_and_delete_nothing(config, tmp_path, monkeypatch, changes, error, message):
    out = tmp_path / "out"
    if "quality_network" in changes:
        monkeypatch.setattr(compare_module, "load_network", missing_network)
    if "align" in changes:
        changes = changes | {"align": {"align": "repa", **changes["align"]}}
    with pytest.raises(error, match=message):
        compare(CompareCommand(replaced(config, **changes), out))
    assert not out.exists()
    out.mkdir()
    (out / "compare.json").write_text("{}")
    with pytest.raises(error, match=message):
        compare(CompareCommand(replaced(config, **changes), out, overwrite=True))
    assert [path.name for path in out.iterdir()] == ["compare.json"]


def test_overwriting_begins_anew_and_deletes_comparisons_only(config, tmp_path):
    out, other = tmp_path / "out", replaced(config, marks=3)
    prepare(config, out)
    (out / "vanilla").mkdir()
    with pytest.raises(ConfigError, match=r"--marks was 2, now 3; .*--overwrite"):
        prepare(other, out)
    with pytest.raises(ConfigError, match="exclude"):
        prepare(other, out, resume=True, overwrite=True)
    prepare(other, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["compare.json"]
    prepare(other, out)
    with pytest.raises(ConfigError, match="is not a comparison"):
        prepare(other, tmp_path, overwrite=True)
    assert (tmp_path / "data.npz").is_file()


def test_comparison_goes_on_from_before_a_damaged_checkpoint(config, tmp_path, caplog):
    config, out = replaced(config, seeds=1), tmp_path / "out"
    compare(CompareCommand(config, out))
    before = qualities(out)
    ema = out / "layersync/seed-0/checkpoints/step_00000006/ema.safetensors"
    content = bytearray(ema.read_bytes())
    content[-20] ^= 1
    ema.write_bytes(content)
    compare(CompareCommand(config, out))
    assert "ema.safetensors: it is damaged" in caplog.text
    assert qualities(out) == before
    assert (out / "layersync/seed-0/checkpoints/damaged-step_00000006").is_dir()
    Trainer(config.train).load(ema.parent)


def test_other_settings_are_refused_and_more_seeds_are_not(config, tmp_path):
    prepare(config, tmp_path / "out")
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16"), marks=3)
    with pytest.raises(ConfigError, match=r"--precision was fp32, now bf16; --marks was 2, now 3"):
        prepare(other, tmp_path / "out")
    align = dataclasses.replace(config.train.align, align_when=AlignScheduleConfig(every=2))
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, align=align))
    with pytest.raises(ConfigError, match="settings: --align-every was 1, now 2"):
        prepare(other, tmp_path / "out")
    prepare(dataclasses.replace(config, seeds=3), tmp_path / "out")
    with pytest.raises(ConfigError, match="--seeds was 3, now 2"):
        prepare(config, tmp_path / "out")


def test_folders_that_cannot_be_used_are_named(config, tmp_path):
    with pytest.raises(ConfigError, match=r"is not a comparison \(it has no compare.json\)"):
        prepare(config, tmp_path)  # the data lies in it
    with pytest.raises(ConfigError, match="not a comparison to resume"):
        prepare(config, tmp_path / "out", resume=True)
    with pytest.raises(CheckpointError, match="cannot write the comparison"):
        prepare(config, tmp_path / "data.npz" / "out")


def test_time_limit_ends_a_run_where_it_is_measured(config, tmp_path, monkeypatch):
    optim = dataclasses.replace(config.train.optim, max_seconds=1e-3)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, optim=optim), seeds=1)
    compare(CompareCommand(config, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [[mark["step"] for mark in run["marks"]] for run in report["runs"]] == [[0, 1], [0, 1]]
    assert (
        compare(CompareCommand(config, tmp_path / "out")) == tmp_path / "out" / "report.md"
    )  # nothing is trained again


def test_memory_is_measured_in_a_process_of_its_own(config):
    assert 1e5 < measure_memory(config, config.train) < 5e8


def test_frechet_distance_of_gaussians_in_closed_form():
    mean, first, second = (
        torch.tensor([1.0, 2, 3]).double(),
        torch.diag(torch.tensor([1.0, 4, 0]).double()),
        torch.eye(3),
    )
    distance = frechet_distance(Gaussian(mean, first), Gaussian(torch.zeros(3).double(), second.double()))
    assert distance == pytest.approx(14 + 0 + 1 + 1)  # |m|², and (sqrt a - sqrt b)² of each direction
    rotation, _ = torch.linalg.qr(torch.randn(3, 3).double())
    a, b = (Gaussian(mean, rotation @ c.double() @ rotation.T) for c in (first, second))
    assert frechet_distance(a, b) == pytest.approx(2)
    x = torch.randn(50, 3)
    assert frechet_distance(Gaussian.of(x), Gaussian.of(x)) == pytest.approx(0, abs=1e-9)


def run_of(method, seed, losses, seconds_per_step):
    marks = [
        {"step": 10 * i, "seconds": 10 * i * seconds_per_step, "validation_loss": loss, "frechet": None}
        for i, loss in enumerate(losses)
    ]
    return {"arm": method, "seed": seed, "marks": marks}


def test_summary_of_curves_worked_out_by_hand():
    """The second method is twice as slow; it comes to 0.4 at step 15, in the second seed not at all."""
    runs = [
        run_of("a", 0, [1, 0.6, 0.4], 1),
        run_of("b", 0, [1, 0.5, 0.3], 2),
        run_of("a", 1, [1, 0.6, 0.4], 1),
        run_of("b", 1, [1, 0.9, 0.8], 2),
    ]
    summary = summarise(runs, baseline="a", batch_size=3)
    assert (summary["steps"], summary["seconds"]) == (20, 20)
    slow = summary["arms"]["b"]
    assert slow["images_per_second"] == [1.5, 1.5]
    assert slow["relative_rate"] == [0.5, 0.5]
    loss = slow["validation_loss"]
    assert loss["at_steps"] == [0.3, 0.8]
    assert loss["at_seconds"] == [0.5, 0.9]
    assert loss["speedup_steps"] == [pytest.approx(20 / 15), None]
    assert loss["speedup_seconds"] == [pytest.approx(20 / 30), None]
    assert slow["frechet"]["at_steps"] == [None, None]
    report = {"summary": summary, "runs": runs, "seeds": [0, 1], "baseline": "a", "memory": {"a": None, "b": 2e6}}
    text = markdown(report | {"plan": "", "primary": "validation_loss", "pairs": {}, "notes": ["n"]}, "p.png")
    # The mean curves do not reach it, nor do most resamples; those of the first seed alone do.
    assert "| b | validation loss | not reached (to 1.33x) | 1 of 2 | not reached (to 0.67x) | 1 of 2 |" in text
    assert (
        "| b | validation loss | steps | -0.1000 | +0.4000 | +0.1500 | -0.0813 to +0.3812 | -3.0266 to +3.3266 |"
        in text
    )
    assert "| b | +0.1500 | -3.0266 to +3.3266 | **does not tell** |" in text
    assert "Fréchet" not in text


@pytest.mark.parametrize(
    ("distances", "difference"), [((5, 5), "+0.000"), ((0.39612, 0.4), "+0.0039"), ((2570.4, 2389.6), "-181")]
)
def test_one_measurement_makes_no_curve(distances, difference):
    """It says nothing of how soon a quality is reached, nor of equal seconds. The least distance has four figures."""
    runs = [run_of(method, 0, [1, 0.6, 0.4], 1) for method in "ab"]
    for run, distance in zip(runs, distances, strict=True):
        run["marks"][-1]["frechet"] = distance
    report = {"summary": summarise(runs, baseline="a", batch_size=3), "runs": runs, "seeds": [0], "baseline": "a"}
    text = markdown(
        report | {"memory": {"a": None, "b": None}, "plan": "", "primary": "validation_loss", "pairs": {}, "notes": []},
        "p.png",
    )
    assert f"| b | Fréchet distance | steps | {difference} |" in text
    assert text.count("| b | Fréchet distance |") == 1


def test_nothing_is_read_off_outside_of_the_marks():
    assert value_at([5, 10], [1, 0], 7.5) == 0.5
    assert value_at([5, 10], [1, 0], 4) is None
    assert first_at([5, 10], [0.5, 0], 0.7) == 5
    assert first_at([5, 10], [0.5, 0.4], 0.1) is None
