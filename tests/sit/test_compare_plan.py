"""What a comparison says before it starts, and how it is trained on several devices."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest

from layersync_kernels.errors import ConfigError, TrainingDiverged
from layersync_kernels.sit.checkpoints.local import list_checkpoints
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.studies.compare import run as compare_module
from layersync_kernels.sit.studies.compare.command import compare
from layersync_kernels.sit.studies.compare.config import CompareCommand, CompareConfig
from layersync_kernels.sit.studies.compare.devices import Call, side_by_side
from layersync_kernels.sit.studies.compare.pilot import Pilot, Spread, pilot_config, power_lines
from layersync_kernels.sit.studies.compare.report import verdict
from layersync_kernels.sit.studies.compare.run import PILOT, PLAN, Comparison
from layersync_kernels.sit.studies.compare.statistics import paired_interval

from .tiny import tiny_config


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two arms, two seeds, eight steps, no network."""
    monkeypatch.setattr(compare_module, "measure_memory", lambda config, run: 3_000_000)
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(60) % 3)
    train = tiny_config(optim={"steps": 8}, data=DataConfig(data=str(tmp_path / "data.npz")))
    return CompareConfig(
        train=train,
        methods=("strong=layersync --layersync 1:3 --weight 0.5", "vanilla"),
        seeds=2,
        marks=2,
        held_out=20,
        quality_network="none",
        probe_samples=12,
        pilot=0.5,
    )


def losses(out):
    runs = json.loads((out / "report.json").read_text())["runs"]
    return {(run["arm"], run["seed"]): [mark["validation_loss"] for mark in run["marks"]] for run in runs}


def test_the_plan_is_there_before_the_first_step_and_stays(config, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []
    train = Comparison.train

    def watched(self, *args):
        seen.append((self.out.name, (out / PLAN).is_file(), [list_checkpoints(run.folder) for run in self.runs]))
        return train(self, *args)

    monkeypatch.setattr(Comparison, "train", watched)
    compare(CompareCommand(config, out))
    assert [name for name, *_ in seen] == [PILOT, "out"]
    assert seen[1][1:] == (True, [[]] * 4)
    plan = (out / PLAN).read_text()
    for line in (
        "- **strong**: LayerSync 1:3, weight 0.5",
        "- **vanilla**: nothing but the flow loss",
        "2 seeds of each, from 0 on",
        "One number decides: the validation loss",
        "A pilot of 2 other seeds of vanilla and strong",
        "8 steps of batches of 5",
    ):
        assert line in plan
    assert plan.strip() in (out / "report.md").read_text()
    assert "Written before the first step" in plan
    (out / PLAN).write_text("## The plan\n\nas it was\n")
    compare(CompareCommand(config, out))
    assert "as it was" in (out / "report.md").read_text()
    (out / PLAN).unlink()
    compare(CompareCommand(config, out))
    assert "Written when steps had been trained already" in (out / "report.md").read_text()
    assert [name for name, *_ in seen] == [PILOT, "out", "out", "out"]  # no second pilot


def test_a_pilot_is_short_and_shares_no_seed_with_the_study(config, tmp_path):
    own = pilot_config(config)
    assert (own.train.optim.steps, own.train.optim.warmup_steps, own.marks, own.seeds) == (4, 2, 4, 2)
    assert [arm.name for arm in own.arms()] == ["vanilla", "strong"]
    seeds = {run.seed for run in Comparison(own, tmp_path / "pilot").runs}
    assert not seeds & {run.seed for run in Comparison(dataclasses.replace(config, seeds=50), tmp_path / "out").runs}
    own.validate()


def test_power_of_a_pilot_in_words():
    pilot = Pilot(("vanilla", "b"), 3, (Spread("validation_loss", 40, 0.5, 0.05), Spread("frechet", 40, 20.0, 0.1)))
    head, _, loss, distance = power_lines(pilot)
    assert head == "| quality | after steps | baseline | deviation | 1% | 2% | 5% | 10% | 20% | 3 seeds find |"
    assert loss == "| validation loss | 40 | 0.5 | 5.00% | 199 | 52 | 10 | 5 | 3 | 16.3% |"
    assert distance == "| Fréchet distance | 40 | 20 | 10.00% | 787 | 199 | 34 | 10 | 5 | 32.6% |"


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([-1.0, -1.1, -0.9], "better"),
        ([1.0, 1.1, 0.9], "worse"),
        ([-1.0, -0.1, -3.0], "does not tell"),  # all agree, and the interval holds 0
        ([-1.0, 0.1, -1.0], "does not tell"),
        ([-1.0], "does not tell (one seed)"),
    ],
)
def test_the_rule_of_the_plan(differences, words):
    assert verdict({"seeds": differences, **dataclasses.asdict(paired_interval(differences))}) == words


def test_blocks_are_looked_at_before_and_after(config, tmp_path):
    compare(CompareCommand(dataclasses.replace(config, pilot=0.0), tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for run in report["runs"]:
        first, middle, last = (mark.get("blocks") for mark in run["marks"])
        assert middle is None
        assert first["cosine"] != last["cosine"]
        assert len(first["accuracy"]["mean"]) == len(last["effective_rank"][0]) == 3
    starts = [run["marks"][0]["blocks"] for run in report["runs"] if run["seed"] == 0]
    assert starts[0] == starts[1]
    text = (tmp_path / "out" / "report.md").read_text()
    blocks = report["summary"]["arms"]["strong"]["blocks"]["probe"]
    assert f"| {blocks['difference']['mean']:+.2f} |" in text
    student, teacher = 1, 3
    ends = [
        np.mean(
            [
                run["marks"][i]["blocks"]["cosine"][student - 1][teacher - 1]
                for run in report["runs"]
                if run["arm"] == "strong"
            ]
        )
        for i in (0, -1)
    ]
    assert f"| strong | {ends[0]:.3f} to {ends[1]:.3f} (aligned) |" in text


def test_several_devices_report_what_one_does(config, tmp_path):
    config = dataclasses.replace(config, probe_samples=0, pilot=0.0)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, threads=1))
    compare(CompareCommand(config, tmp_path / "one"))
    compare(CompareCommand(config, tmp_path / "two", devices=("cpu", "cpu")))
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    with pytest.raises(ConfigError, match="nonsense"):
        compare(CompareCommand(config, tmp_path / "two", devices=("cpu", "nonsense")))
    with pytest.raises(ConfigError, match="nonsense"):
        compare(CompareCommand(config, tmp_path / "three", devices=("cpu", "nonsense")))
    assert not (tmp_path / "three").exists()  # told before anything is begun


def finish(path, stop_asked):
    """Waits to be stopped."""
    while not stop_asked():
        time.sleep(0.01)
    path.write_text("saved")
    return False


def diverge(stop_asked):
    raise TrainingDiverged("the loss is not finite")


def test_where_one_device_fails_the_others_save_and_the_error_is_told(tmp_path):
    with pytest.raises(TrainingDiverged, match="the loss is not finite"):
        side_by_side([Call(finish, (tmp_path / "other",)), Call(diverge, ())], lambda: 0)
    assert (tmp_path / "other").read_text() == "saved"
    assert not side_by_side([Call(finish, (tmp_path / "again",))], lambda: 15)


def test_held_out_samples_of_the_test_split(config, tmp_path):
    split = dataclasses.replace(config, validation_split=True, held_out=None)
    with pytest.raises(ConfigError, match="give --split train, not all"):
        split.validate()
    data = dataclasses.replace(config.train.data, split="train")
    split = dataclasses.replace(split, train=dataclasses.replace(config.train, data=data))
    split.validate()
    comparison = Comparison(split, tmp_path / "out")
    assert (len(comparison.train_set), len(comparison.held_out)) == (54, 6)
    with pytest.raises(ConfigError, match="exclude each other"):
        dataclasses.replace(split, validation=tmp_path / "data.npz").validate()
