from __future__ import annotations

import subprocess
import sys

import pytest

from layersync_kernels import cli
from layersync_kernels.sit.config.io import load_config
from layersync_kernels.sit.config.run import CONFIG

TINY = [
    *("--image-size=4", "--model=SiT-P/2", "--hidden-size=8", "--num-heads=2", "--depth=3", "--batch-size=4"),
    *("--steps=4", "--log-every=2", "--sample-every=2", "--checkpoint-every=2", "--no-tensorboard", "--device=cpu"),
    *("--solver=euler", "--sampling-steps=2", "--grid-columns=1"),
]


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "sample", "evaluate", "probe", "demo", "bench", "tune", "doctor"))
    assert cli.main([]) == 2


def test_unknown_command_is_an_error(capsys):
    assert cli.main(["trane"]) == 2
    assert "no command 'trane'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sample", "demo"])
def test_help_of_a_command_shows_its_flags(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--cfg-scale" in out
    assert command == "sample" or all(flag in out for flag in ("--layersync", "--weight", "--lr", "--resume"))


def test_wrong_flag_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--learning-rate", "1"])
    assert stop.value.code == 2


def test_commands_that_do_not_train_do_not_import_the_trainer():
    script = (
        "import sys; from layersync_kernels import cli; cli.main(['--help']);"
        "assert not any(name.startswith('layersync_kernels.sit') or name == 'tyro' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_train_resume_and_sample(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(["train", "--out", str(run), *TINY, "--layersync", "1:3", "2:3", "--weight", "0.5"]) == 0
    config = load_config(run / CONFIG)
    assert config.layersync.layersync == ("1:3", "2:3")
    assert config.layersync.weight == (0.5,)

    assert cli.main(["train", "--out", str(run), *TINY]) == 1
    assert "run exists" in capsys.readouterr().err
    assert cli.main(["train", "--out", str(run), "--resume"]) == 1
    assert "finished at step 4" in capsys.readouterr().err

    # The run's own config is the default, and flags given now come over it.
    assert cli.main(["train", "--out", str(run), "--resume", "--steps", "6"]) == 0
    resumed = load_config(run / CONFIG)
    assert resumed.optim.steps == 6
    assert resumed.layersync == config.layersync
    assert resumed.model == config.model

    capsys.readouterr()
    assert cli.main(["sample", str(run), "--classes", "3", "7", "--out", str(tmp_path / "g.png")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "g.png")
    assert (tmp_path / "g.png").is_file()


def test_off_is_one_flag(tmp_path):
    assert cli.main(["train", "--out", str(tmp_path / "run"), *TINY, "--layersync", "off"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "SiT-Z/2"], "known: SiT-XL/2"),
        (["train", "--data", "nowhere"], "no data named 'nowhere'"),
        (["train", "--resume"], "not a run to resume"),
        (["train", "--layersync", "5:40"], "the model has blocks 1 to"),
        (["train", "--image-size", "13"], "not a multiple of patch_size"),
        (["sample", "nowhere"], "nowhere does not exist"),
        (["probe", "nowhere"], "nowhere does not exist"),
        (["evaluate", "nowhere"], "nowhere does not exist"),
    ],
)
def test_errors_are_one_line_without_traceback(tmp_path, capsys, arguments, message):
    if arguments[0] == "train":
        arguments = [*arguments, "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_demo_trains_samples_and_compares(tmp_path, capsys):
    flags = [*TINY, "--out", str(tmp_path / "demo")]
    assert cli.main(["demo", *flags]) == 0
    captured = capsys.readouterr()
    assert "grid.png" in captured.out
    assert "curves.png" in captured.out
    assert "eager" in captured.err
    assert cli.main(["demo", *flags]) == 0  # again, over the earlier one
