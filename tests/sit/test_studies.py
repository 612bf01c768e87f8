"""Studies by name: settings that hold together, and those for a card in miniature."""

from __future__ import annotations

import json

import numpy as np
import pytest

from layersync_kernels import cli
from layersync_kernels.sit.config.io import load_settings, save_config
from layersync_kernels.sit.studies.compare import run as compare_module
from layersync_kernels.sit.studies.compare.config import CompareConfig
from layersync_kernels.sit.studies.compare.plan import pairs_of
from layersync_kernels.sit.studies.compare.presets import STUDIES

DEPTHS = {"SiT-P/2": 8, "SiT-B/2": 12}


@pytest.mark.parametrize("name", STUDIES)
def test_studies_are_settings_that_can_be_kept(name, tmp_path):
    study = STUDIES[name]
    study.validate()
    save_config(study, tmp_path / "compare.json")
    assert load_settings(tmp_path / "compare.json", CompareConfig) == study
    arms = {arm.name: pairs_of(arm.config) for arm in study.arms()}
    assert list(arms) == ["vanilla", "near", "near-strong", "far", "far-strong", "paper"]
    depth = DEPTHS[study.train.model.model]
    assert arms["paper"] == [f"{round(8 / 28 * depth)}:{round(16 / 28 * depth)}"]
    assert all(1 <= int(block) <= depth for pairs in arms.values() for pair in pairs for block in pair.split(":"))


@pytest.mark.parametrize("name", ["images-cifar10", "images-latents"])
def test_a_study_for_a_card_runs_in_miniature(name, tmp_path, monkeypatch):
    """Every arm of it, in its depth, from the one command."""
    monkeypatch.setattr(compare_module, "measure_memory", lambda config, run: None)
    shape = (30, 4, 4, 4) if name.endswith("latents") else (30, 4, 4)
    data = {"images": np.zeros(shape, np.uint8), "labels": np.arange(30) % 3}
    if name.endswith("latents"):
        data = {"latents": np.random.default_rng(0).normal(size=shape).astype(np.float32), "labels": np.arange(30) % 3}
    np.savez(tmp_path / "data.npz", **data)
    small = "--hidden-size 16 --num-heads 2 --depth 12 --steps 2 --batch-size 4 --device cpu --precision fp32"
    brief = "--marks 1 --seeds 1 --pilot 0 --probe-samples 0 --quality-network none --no-tensorboard"
    out = tmp_path / "out"
    argv = ["compare", "--study", name, "--data", str(tmp_path / "data.npz"), "--out", str(out), *small.split()]
    argv += ["--no-flip", *brief.split()]
    assert cli.main(argv) == 0
    runs = json.loads((out / "report.json").read_text())["runs"]
    assert [run["arm"] for run in runs] == [arm.name for arm in STUDIES[name].arms()]
    assert all(run["marks"][-1]["step"] == 2 for run in runs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--study", "smells"], "--study smells: no such study; known: images, motion"),
        (["--study", "images", "--preset", "audio"], "--study has settings of its own"),
    ],
)
def test_studies_that_are_none_are_told(flags, message, tmp_path, capsys):
    assert cli.main(["compare", *flags, "--out", str(tmp_path / "out")]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
