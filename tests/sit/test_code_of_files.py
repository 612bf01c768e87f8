"""Code runs only for what the command line of this very call names."""

from __future__ import annotations

import dataclasses
import json
import typing

import numpy as np
import pytest
import torch

from layersync_kernels import cli
from layersync_kernels.sit.commands.arguments import code_flags, parse, read_settings
from layersync_kernels.sit.commands.train import TrainCommand
from layersync_kernels.sit.config.io import save_config
from layersync_kernels.sit.config.loss import AlignConfig
from layersync_kernels.sit.config.run import CONFIG, TrainConfig
from layersync_kernels.sit.studies.compare.config import SETTINGS, CompareCommand, CompareConfig
from layersync_kernels.sit.teachers.networks import load_teacher

SIZE = [
    *("--model=SiT-P/2", "--hidden-size=8", "--num-heads=2", "--depth=2", "--batch-size=4", "--steps=2"),
    *("--sample-every=0", "--no-tensorboard", "--device=cpu", "--precision=fp32", "--teacher-size=4"),
]


@pytest.fixture
def code(tmp_path):
    """The name of a teacher whose code leaves a mark in the file "ran" when it is executed."""
    np.savez(tmp_path / "data.npz", images=np.zeros((60, 4, 4), np.uint8), labels=np.arange(60) % 3)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "hubconf.py").write_text(
        "import pathlib, torch\n"
        "pathlib.Path(__file__).with_name('ran').touch()\n"
        "def net(pretrained):\n"
        "    return torch.nn.Conv2d(3, 8, 2, 2)\n"
    )
    return f"hub/{tmp_path}/code:net"


def ran(tmp_path):
    """Whether the code was executed since this was last asked."""
    mark = tmp_path / "code" / "ran"
    found = mark.exists()
    mark.unlink(missing_ok=True)
    return found


def train(tmp_path, *flags, run="run"):
    return cli.main(["train", "--out", str(tmp_path / run), *flags])


def test_resume_runs_the_code_of_a_teacher_only_when_it_is_named_again(tmp_path, capsys, code):
    first = [*SIZE, f"--data={tmp_path / 'data.npz'}", "--align=repa", f"--teacher={code}"]
    assert train(tmp_path, *first) == 0
    assert ran(tmp_path)
    assert train(tmp_path, "--resume", "--steps=4") == 1
    assert not ran(tmp_path)
    error = " ".join(capsys.readouterr().err.split())
    typed = f"layersync train --out {tmp_path / 'run'} --resume --steps=4 --teacher {code}"
    assert error.endswith(f"a file must not start any. If you trust that code, name it yourself: {typed}")
    assert cli.main(typed.split()[1:]) == 0
    assert ran(tmp_path)


def test_a_teacher_with_precomputed_features_does_not_run_and_need_not_be_named(tmp_path, code):
    features = tmp_path / "features.safetensors"
    data = f"--data={tmp_path / 'data.npz'}"
    own = ["--device=cpu", "--precision=fp32", "--teacher-size=4"]
    assert cli.main(["features", data, f"--teacher={code}", f"--out={features}", *own]) == 0
    assert train(tmp_path, *SIZE, data, "--align=repa", f"--teacher={code}", f"--features={features}") == 0
    assert ran(tmp_path)
    assert train(tmp_path, "--resume", "--steps=4") == 0
    assert not ran(tmp_path)
    assert train(tmp_path, "--resume", "--steps=6", "--features=None") == 1


def strings(kind, path=()):
    """The path of every setting that may hold any string."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from strings(hint, (*path, name))
        elif hint is str or hint == str | None:
            yield (*path, name)


def changed(settings, path, value):
    """The settings with another value at a path."""
    name, *rest = path
    return dataclasses.replace(settings, **{name: changed(getattr(settings, name), rest, value) if rest else value})


@pytest.mark.parametrize("path", list(strings(TrainConfig)), ids=".".join)
def test_no_setting_of_a_run_starts_code(tmp_path, code, path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    flags = [*SIZE, f"--data={tmp_path / 'data.npz'}"]
    settings = parse(TrainCommand, flags, default=TrainCommand(), command="").config
    if path[-1] == "teacher":
        settings = changed(settings, ("align", "align"), "repa")
    (tmp_path / "run").mkdir()
    save_config(changed(settings, path, code), tmp_path / "run" / CONFIG)
    no_error = path[-1] in ("diffusion_form", "wandb")  # which the solver does not ask; the name of a project
    assert train(tmp_path, "--resume") == (0 if no_error else 1)
    assert not ran(tmp_path)


@pytest.mark.parametrize("path", [p for p in strings(CompareConfig) if p[0] != "train"], ids=".".join)
def test_no_setting_of_a_comparison_starts_code(tmp_path, code, path):
    flags = ["--methods", "vanilla", "layersync", "--seeds=1", "--marks=1", *SIZE, f"--data={tmp_path / 'data.npz'}"]
    settings = parse(CompareCommand, flags, default=CompareCommand(), command="").comparison
    (tmp_path / "out").mkdir()
    save_config(changed(settings, path, code), tmp_path / "out" / SETTINGS)
    assert cli.main(["compare", "--out", str(tmp_path / "out"), "--resume"]) == 1
    assert not ran(tmp_path)


def test_comparison_says_which_two_names_to_repeat(tmp_path, capsys, code):
    settings = {"quality_network": code, "train": {"align": {"align": "repa", "teacher": code}}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SETTINGS).write_text(json.dumps(settings))
    flags = [*SIZE, "--seeds=1", "--marks=1", f"--data={tmp_path / 'data.npz'}"]  # should it come to train
    assert cli.main(["compare", *flags, "--out", str(tmp_path / "out"), "--resume"]) == 1
    assert " ".join(capsys.readouterr().err.split()).endswith(f"--resume --teacher {code} --quality-network {code}")


@pytest.mark.parametrize("command", ["probe", "sample"])
def test_commands_about_a_run_take_no_code_from_it(tmp_path, capsys, code, command):
    settings = {"data": {"data": "torchvision:LSUN"}, "align": {"align": "repa", "teacher": code}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text(json.dumps(settings))
    assert cli.main([command, str(tmp_path / "run")]) == 1
    assert not ran(tmp_path)
    assert ("--data torchvision:LSUN" in capsys.readouterr().err) == (command == "probe")


def test_probe_runs_the_code_of_a_network_that_is_named_for_it_alone(tmp_path, code):
    data = [f"--data={tmp_path / 'data.npz'}", "--align=repa", f"--teacher={code}"]
    for run in ("run", "other"):
        assert train(tmp_path, *SIZE, *data, run=run) == 0
    assert ran(tmp_path)
    flags = ["probe", str(tmp_path / "run"), "--beside", str(tmp_path / "other"), "--samples=8", "--device=cpu"]
    assert cli.main(flags) == 0
    assert not ran(tmp_path)
    assert cli.main([*flags, f"--teacher={code}", "--teacher-size=4"]) == 0
    assert ran(tmp_path)


def test_what_a_flag_names_is_not_taken_for_the_file_s(tmp_path, code):
    (tmp_path / CONFIG).write_text(json.dumps({"align": {"align": "repa", "teacher": code}}))
    default = TrainCommand(config=read_settings(tmp_path / CONFIG, TrainConfig))
    command = parse(TrainCommand, ["--teacher", code], default=default, command="train")
    assert code_flags(command) == {"--teacher": code}
    assert type(command.config.align.teacher) is str
    assert parse(TrainCommand, ["--align=off", "--teacher=None"], default=default, command="train").config.align == (
        AlignConfig()
    )


@pytest.mark.parametrize(("name", "trust"), [("hub/owner/repo:net", True), ("dinov2-vits14", "check")])
def test_only_a_repository_that_was_typed_is_trusted_without_torch_hub_s_own_check(monkeypatch, name, trust):
    asked = []

    def load(*_, trust_repo, **__):
        asked.append(trust_repo)
        return torch.nn.Identity()

    monkeypatch.setattr(torch.hub, "load", load)
    load_teacher(name)
    assert asked == [trust]
