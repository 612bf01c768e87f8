"""Presets, files of settings, and what stands below what."""

import dataclasses
import json
import os

import pytest
import yaml

from layersync_kernels import cli
from layersync_kernels.errors import ConfigError
from layersync_kernels.sit.commands.arguments import parse, starting_point
from layersync_kernels.sit.commands.features import FeaturesCommand
from layersync_kernels.sit.commands.train import TrainCommand
from layersync_kernels.sit.config.io import load_config, read_overlay, save_config
from layersync_kernels.sit.config.run import TrainConfig
from layersync_kernels.sit.presets.registry import PRESETS
from layersync_kernels.sit.studies.compare.config import CompareConfig

from .tiny import tiny_config


def settings(*argv):
    return parse(TrainCommand, argv, default=TrainCommand(config=starting_point(argv)), command="train").config


def file(tmp_path, text, name="run.yaml"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings_that_can_be_kept(tmp_path, name):
    PRESETS[name].validate()
    save_config(PRESETS[name], tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == PRESETS[name]


def test_flags_win_over_the_file_the_file_over_the_preset(tmp_path):
    path = file(tmp_path, "lr: 0.5\noptim: {batch_size: 7}\nlog-every: 3\n")
    config = settings("--preset", "images", "--config", path, "--batch-size", "8")
    assert (config.optim.lr, config.optim.batch_size, config.log.log_every) == (0.5, 8, 3)
    assert config.data == PRESETS["images"].data
    assert settings("--config", path).data == TrainConfig().data
    assert settings("--preset", "paper") == TrainConfig()


def test_what_nobody_asked_to_be_long_takes_minutes():
    """Two cores, then something to look at; with the data that are there, as they are."""
    assert settings() == settings("--data", "mnist") == PRESETS["images"]
    config = settings("--data", "images.npz")
    assert config.data == dataclasses.replace(TrainConfig().data, data="images.npz")
    for optim in (config.optim, settings().optim, settings("--config", os.devnull).optim):
        assert optim.max_seconds <= 600
        assert optim.ema_warmup
    assert settings("--data", "images.npz", "--steps", "7").optim.steps == 7
    compared = CompareConfig(train=starting_point(["--data", "images.npz"], steps=2000, max_seconds=60.0))
    assert compared.train.optim.max_seconds * len(compared.methods) * compared.seeds <= 12 * 60
    assert starting_point(["--preset", "paper"], steps=2000).optim.steps == 400_000


def test_unknown_preset_lists_those_known(capsys):
    assert cli.main(["train", "--preset", "smells"]) == 1
    assert "--preset smells: no such preset; known: small, " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_the_config_of_a_run_is_a_file_of_settings(tmp_path, kind):
    config = tiny_config()
    save_config(config, tmp_path / "config.json")
    text = (tmp_path / "config.json").read_text()
    path = file(tmp_path, text if kind == "json" else yaml.safe_dump(json.loads(text)), f"x.{kind}")
    assert settings("--config", path) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1e-4", 1e-4),  # a string to YAML 1.1
        ("lr: 1", 1.0),
        ("optim: {lr: 2.5e-3}", 2.5e-3),
        ("", 3e-3),  # of the preset "small"
    ],
)
def test_numbers_as_people_write_them(tmp_path, text, expected):
    assert settings("--config", file(tmp_path, text)).optim.lr == expected


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("lr: fast", "lr is 'fast'; expected float"),
        ("speed: 3", "speed is no setting"),
        ("optim: {speed: 3}", r"optim\.speed is no setting"),
        ("start_step: 3", "start_step stands in several groups, layersync, align, dispersive: name one"),
        ("lr: 1\nlr: 2", "lr is set twice"),
        ("- lr", "expected settings by name"),
        ("optim: 3", r"optim\. *expected settings by name, found 3"),
        ("lr: [", "cannot read the config"),
        ("x: !!python/object/apply:os.system [ls]", "cannot read the config"),
        ("\ud800", "cannot read the config"),
    ],
)
def test_bad_files_are_named(tmp_path, text, match):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match=match) as error:
        read_overlay(path, TrainConfig())
    assert "bad.yaml" in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config .*none\.yaml"):
        read_overlay(tmp_path / "none.yaml", TrainConfig())


def test_a_file_starts_no_code(tmp_path):
    path = file(tmp_path, f"align: {{align: repa, teacher: 'hub/{tmp_path}:net'}}")
    with pytest.raises(ConfigError, match="a file must not start any"):
        settings("--config", path)


def test_a_run_that_goes_on_has_its_settings(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    save_config(tiny_config(), tmp_path / "run" / "config.json")
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--resume", "--preset", "images"]) == 1
    assert "leave --preset and --config out" in capsys.readouterr().err


def test_other_commands_take_presets_too(tmp_path):
    path = file(tmp_path, "image_size: 28")
    argv = ["--preset", "images", "--config", path]
    command = parse(FeaturesCommand, argv, default=FeaturesCommand(data=starting_point(argv).data), command="features")
    assert (command.data.data, command.data.image_size) == ("mnist", 28)
