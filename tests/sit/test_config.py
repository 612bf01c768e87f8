from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from layersync_kernels.errors import ConfigError, UserError
from layersync_kernels.sit.commands.arguments import parse
from layersync_kernels.sit.commands.train import TrainCommand, run_training
from layersync_kernels.sit.config.io import load_config, save_config
from layersync_kernels.sit.config.loss import AlignScheduleConfig, LayerSyncConfig, ScheduleConfig
from layersync_kernels.sit.config.optim import OptimConfig
from layersync_kernels.sit.config.run import TrainConfig
from layersync_kernels.sit.presets.registry import PRESETS
from layersync_kernels.sit.training.terms.layersync import build_loss

from .tiny import tiny_config, tiny_data

BEFORE_ROOMS = Path(__file__).parent / "golden" / "config_before_rooms.json"


@pytest.fixture(autouse=True)
def _tiny_data(monkeypatch):
    monkeypatch.setattr("layersync_kernels.sit.training.loop.load_data", lambda config, device: tiny_data())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layersync": ("2:9",)}, r"2:9: the model has blocks 1 to 3"),
        ({"layersync": ("2:2",)}, "both block 2"),
        ({"layersync": ("3:1",)}, "did you mean"),
        ({"layersync": ("0:2",)}, "counted from 1"),
        ({"layersync": ("8-16",)}, "expected STUDENT:TEACHER"),
        ({"layersync": ("auto", "1:2")}, "alone"),
        ({"layersync": ()}, "at least one"),
        ({"weight": (0.1, 0.2)}, "2 weights for 1 pairs"),
        ({"when": ScheduleConfig(schedule="cosine")}, "stop_step"),
        ({"when": ScheduleConfig(every=0)}, "every"),
    ],
)
def test_bad_layersync_settings_are_explained(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_loss(dataclasses.replace(LayerSyncConfig(), **changes), depth=3)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"model": {"model": "SiT-XXXL/2"}}, r"SiT-XXXL/2.*SiT-XL/2"),
        ({"model": {"patch_size": 3}}, r"input_size=4 .*patch_size=3"),
        ({"model": {"num_heads": 5}}, "num_heads=5"),
        ({"model": {"num_classes": 2}}, "the data has 3"),
        ({"model": {"class_dropout": 1.5}}, "--class-dropout 1.5"),
        ({"optim": {"batch_size": 0}}, "--batch-size 0"),
        ({"optim": {"accumulate": 2}}, "does not divide"),
        ({"optim": {"lr": -1.0}}, "--lr -1.0"),
        ({"optim": {"ema_decay": 1.0}}, "--ema-decay 1.0"),
        ({"optim": {"clip_norm": 0.0}}, "--clip-norm"),
        ({"optim": {"max_seconds": 0.0}}, "--max-seconds"),
        ({"log": {"log_every": 0}}, "--log-every 0"),
        ({"sampling": {"guidance_interval": (0.8, 0.2)}}, "--guidance-interval"),
        ({"sampling": {"sampler": "sde", "solver": "dopri5"}}, "--sampler sde"),
        ({"transport": {"loss_weight": "velocity"}}, "no weight"),
        ({"device": "cuda:77"}, "--device cuda:77"),
        ({"device": "toaster"}, "--device toaster"),
        ({"data": {"memory_limit_gb": -1.0}}, "--memory-limit-gb -1.0"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_bad_settings_are_explained_before_a_folder_is_made(tmp_path, groups, message):
    with pytest.raises(UserError, match=message):
        run_training(tiny_config(**groups), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [TrainConfig(), tiny_config(), PRESETS["images"]], ids=["default", "tiny", "demo"])
def test_config_file_round_trip(tmp_path, config):
    save_config(config, tmp_path / "c.json")
    assert load_config(tmp_path / "c.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"learning_rate": 1}}, r"unknown settings \['learning_rate'\]"),
        ({"optim": {"steps": "many"}}, r"optim.*steps is 'many'; expected int"),
        ({"optim": {"betas": [0.9]}}, "betas"),
        ({"optim": {"lr": True}}, "lr is True"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"data": []}, "expected an object"),
    ],
)
def test_bad_config_file_names_file_and_setting(tmp_path, change, message):
    (tmp_path / "c.json").write_text(json.dumps(change))
    with pytest.raises(ConfigError, match=rf"c\.json.*{message}"):
        load_config(tmp_path / "c.json")


def test_defaults_are_those_of_the_paper():
    optim = TrainConfig().optim
    assert (optim.lr, optim.lr_schedule, optim.weight_decay, optim.ema_decay) == (1e-4, "constant", 0.0, 0.9999)
    assert (optim.batch_size, optim.warmup_steps, optim.ema_warmup, optim.clip_norm) == (256, 0, False, None)


SCHEDULES = (
    ScheduleConfig(schedule="cosine", start_step=100, stop_step=900, every=2),
    AlignScheduleConfig(schedule="linear", start_step=10, stop_step=500, every=4),
)


def test_file_of_before_schedules_were_a_group_still_loads(tmp_path):
    config = load_config(BEFORE_ROOMS)
    assert (config.layersync.when, config.align.align_when) == SCHEDULES
    assert (config.layersync.layersync, config.layersync.weight) == (("1:3", "2:4"), (0.5, 0.25))
    assert (config.align.align, config.align.teacher, config.align.align_block) == ("irepa", "efficientnet-lite0", 2)
    assert config.optim == OptimConfig(steps=1000, max_seconds=60.0, betas=(0.9, 0.99))
    assert (config.data.flip, config.model.recompute, config.seed, config.threads) == (True, "light", 3, 2)
    save_config(config, tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["layersync"]["when"]["every"] == 2
    assert load_config(tmp_path / "c.json") == config
    half = {"layersync": {"when": {"every": 2}, "stop_step": 5}}
    (tmp_path / "c.json").write_text(json.dumps(half))
    with pytest.raises(ConfigError, match=r"unknown settings \['stop_step'\]"):
        load_config(tmp_path / "c.json")


def test_both_schedules_have_flags_of_their_own():
    flags = "--schedule cosine --start-step 100 --stop-step 900 --every 2 "
    flags += "--align-schedule linear --align-start-step 10 --align-stop-step 500 --align-every 4"
    config = parse(TrainCommand, flags.split(), default=TrainCommand(), command="train").config
    assert (config.layersync.when, config.align.align_when) == SCHEDULES
    default = parse(TrainCommand, ["--every", "3"], default=TrainCommand(config=config), command="train").config
    assert default.layersync.when == dataclasses.replace(SCHEDULES[0], every=3)
    assert default.align.align_when == SCHEDULES[1]
