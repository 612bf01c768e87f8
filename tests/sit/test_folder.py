"""Whose the folder of a run is, and what overwriting it leaves."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from layersync_kernels import cli
from layersync_kernels.errors import CheckpointError, ConfigError
from layersync_kernels.sit.checkpoints.local import list_checkpoints
from layersync_kernels.sit.commands.train import run_training
from layersync_kernels.sit.config.data import NAMED_SETS
from layersync_kernels.sit.config.io import load_config
from layersync_kernels.sit.config.paths import paths_in, with_absolute_paths
from layersync_kernels.sit.config.run import CONFIG
from layersync_kernels.sit.data.registry import KINDS
from layersync_kernels.sit.studies.compare.command import compare, prepare
from layersync_kernels.sit.studies.compare.config import SETTINGS, CompareCommand, CompareConfig
from layersync_kernels.sit.training import folder as module
from layersync_kernels.sit.training.folder import LOCK, lock_folder, replace_folder

from .slow import slow_run
from .tiny import tiny_config, tiny_data

SIZE = [
    *("--model=SiT-P/2", "--hidden-size=8", "--num-heads=2", "--depth=2", "--batch-size=2", "--steps=2"),
    *("--sample-every=0", "--no-tensorboard", "--device=cpu", "--precision=fp32"),
]
WAYS = ({}, {"resume": True}, {"overwrite": True})


def short(**groups):
    return tiny_config(**{"optim": {"steps": 2}, "log": {"sample_every": 0}} | groups)


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros((60, 4, 4), np.uint8), labels=np.arange(60) % 3)
    return tmp_path / "data.npz"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run of 2 steps."""
    monkeypatch.setattr("layersync_kernels.sit.training.loop.load_data", lambda config, device: tiny_data())
    run_training(short(), tmp_path / "run")
    return tmp_path / "run"


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The lock


def test_live_run_is_refused_to_others_and_free_once_it_is_killed(tmp_path):
    run = tmp_path / "run"
    with slow_run(run, 30) as process:
        before = content(run)
        for way in WAYS:
            with pytest.raises(ConfigError, match=f"in use by process {process.pid} on {socket.gethostname()};"):
                run_training(short(), run, **way)
        assert content(run) == before
    assert (run / LOCK).is_file()  # it was killed, and had no chance
    assert load_config(run / CONFIG).data.data == "mnist"
    config = short(data={"data": "mnist", "image_size": 14}, optim={"steps": 2})
    assert run_training(config, run, overwrite=True).step == 2
    assert not (run / LOCK).exists()


START = "import sys; from layersync_kernels import cli; print('ready', flush=True); input(); sys.exit(cli.main())"


def test_of_three_processes_one_has_the_folder(tmp_path, data):
    out = str(tmp_path / "run")
    command = [sys.executable, "-c", START, "train", f"--out={out}", f"--data={data}", *SIZE, "--steps=20"]
    command += ["--checkpoint-every=1"]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 1, 1], errors
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000019", "step_00000020"]
    assert "Traceback" not in "".join(errors)


def test_samples_are_drawn_into_a_run_that_goes_on(run):
    with lock_folder(run):
        assert cli.main(["sample", str(run), "--classes", "0", "--per-class=1"]) == 0
        with pytest.raises(ConfigError, match="in use"):
            run_training(short(optim={"steps": 4}), run, resume=True)
    assert run_training(short(optim={"steps": 4}), run, resume=True).step == 4


def test_lock_of_another_machine_is_kept_until_somebody_removes_it(run):
    (run / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 7, "started": "1"}))
    for way in WAYS:
        with pytest.raises(ConfigError, match=f"process 7 on elsewhere, or was .*remove {run / LOCK}"):
            run_training(short(seed=1), run, **way)
    (run / LOCK).unlink()
    assert run_training(short(seed=1), run, overwrite=True).step == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "\0" * 9, '{"host": 1'])
def test_lock_whose_writer_was_killed_while_it_wrote_is_stale(run, text):
    (run / LOCK).write_text(text)
    run_training(short(), run, overwrite=True)


def test_where_the_file_system_has_no_locks_the_process_is_looked_for(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock_folder(tmp_path):
        written = json.loads((tmp_path / LOCK).read_text())
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"), lock_folder(tmp_path):
            pass
    assert not (tmp_path / LOCK).exists()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for stale in ({"started": "1"}, {"pid": gone.pid}):
        (tmp_path / LOCK).write_text(json.dumps(written | stale))
        with lock_folder(tmp_path):
            pass


def test_folder_and_lock_that_an_error_leaves_unused_are_removed(tmp_path):
    with pytest.raises(ConfigError, match="nonsense"):
        run_training(short(data={"data": "mnist"}, model={"model": "nonsense"}), tmp_path / "some" / "where")
    assert list(tmp_path.iterdir()) == []


def test_runs_of_a_comparison_are_locked_with_it(tmp_path, data, monkeypatch):
    flags = ["--methods", "vanilla", "layersync", "--seeds=1", "--marks=1", "--quality-network=none", *SIZE]
    out, tried = tmp_path / "out", []

    def memory(config, run):
        for folder in (out, out / "vanilla" / "seed-0"):
            with pytest.raises(ConfigError, match="in use"), lock_folder(folder):
                pass
            tried.append(folder)

    monkeypatch.setattr("layersync_kernels.sit.studies.compare.run.measure_memory", memory)
    assert cli.main(["compare", f"--data={data}", f"--out={out}", *flags]) == 0
    assert len(tried) == 4
    assert list(out.rglob(LOCK)) == []


def test_processes_of_a_launcher_train_alone(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("compare", "demo", "probe"):
        assert cli.main([command, "--out", str(tmp_path / "run"), f"--data={data}", *SIZE]) == 1
        assert "is the work of one process, and WORLD_SIZE is 2" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["train", "--out", str(tmp_path / "run"), f"--data={data}", *SIZE]) == 1
    assert "WORLD_SIZE is 2, and RANK is not set; start several" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["train", "--out", str(tmp_path / "run"), f"--data={data}", *SIZE]) == 0


# Overwriting


def sources(run):
    """Settings that read from the folder, by the flag."""
    (run.parent / "link").symlink_to(run / "data.npz")
    (run / "linked").symlink_to(run.parent / "link.npz")
    for path in (run / "data.npz", run.parent / "link.npz"):
        path.touch()
    teacher = {"align": "repa", "teacher": f"hub/{run}:net"}
    yield "--data", {"data": {"data": str(run / "data.npz")}}
    yield "--data", {"data": {"data": str(run)}}
    yield "--data", {"data": {"data": str(run.parent / "link")}}
    yield "--data", {"data": {"data": str(run / "linked")}}
    yield "--data", {"data": {"data": str(run / "checkpoints" / ".." / "data.npz")}}
    yield "--data-root", {"data": {"data": "torchvision:CIFAR10", "data_root": run / "torchvision"}}
    yield "--init", {"model": {"init": run}}
    yield "--features", {"align": {"align": "repa", "features": run / "features.safetensors"}}
    yield "--teacher-weights", {"align": {"align": "repa", "teacher": "timm/x", "teacher_weights": run / "w.pt"}}
    yield "--teacher", {"align": teacher}


def test_overwriting_does_not_delete_what_it_reads(run, monkeypatch):
    cases = list(sources(run))
    before = content(run)
    monkeypatch.chdir(run.parent)
    for flag, groups in cases:
        for out in (run, Path("run")):
            with pytest.raises(ConfigError, match=rf"--overwrite would delete {flag} .* lies in --out {out};"):
                run_training(short(**groups), out, overwrite=True)
    assert content(run) == before
    run_training(short(data={"data": str(run.parent / "link.npz")}), run, overwrite=True)


def test_overwriting_a_comparison_does_not_delete_its_validation_set(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / SETTINGS).write_text("{}")
    (out / "validation.npz").touch()
    before = content(out)
    validation = out / "validation.npz"
    config = CompareConfig(short(data={"data": str(validation)}), marks=1, validation=validation)
    with pytest.raises(ConfigError, match=r"delete --data .* and --validation .* lies in --out"):
        compare(CompareCommand(config, out, overwrite=True))
    assert content(out) == before


class Killed(BaseException):
    """An end without any chance to tidy up."""


def test_an_end_at_any_point_of_overwriting_leaves_a_whole_run(tmp_path, monkeypatch):
    calls = {Path: ("rename", "mkdir", "unlink"), shutil: ("rmtree",), module: ("flush", "_move_lock", "save_config")}
    real = {(where, name): getattr(where, name) for where, names in calls.items() for name in names}

    def counted(call, left):
        def counting(*arguments, **keywords):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return call(*arguments, **keywords)

        return counting

    def write(folder):
        (folder / CONFIG).write_text("new")

    for last in range(20):
        root = tmp_path / str(last)
        (root / "run" / "checkpoints").mkdir(parents=True)
        (root / "run" / CONFIG).write_text("old")
        (root / "run" / "checkpoints" / "1").write_text("old")
        old = content(root / "run")
        left = [last]
        with monkeypatch.context() as patch:
            for (where, name), call in real.items():
                patch.setattr(where, name, counted(call, left))
            try:
                replace_folder(root / "run", write)
                break
            except Killed:
                pass
        found = [content(path) for path in root.iterdir() if not path.name.startswith(".")]
        assert old in found or {Path(CONFIG): b"new"} in found
        assert not (root / "run").exists() or content(root / "run") in (old, {Path(CONFIG): b"new"})
        if (root / "run").exists():
            replace_folder(root / "run", write)  # what is left of it is in nobody's way
    assert last > 5
    assert [path.name for path in root.iterdir()] == ["run"]


def test_overwriting_that_fails_leaves_the_old_run_in_its_place(run, monkeypatch):
    before, rename = content(run), Path.rename

    def failing(path, target):
        if path.name.startswith(".writing-"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match=r"cannot write the run .*Input/output error"):
        run_training(short(seed=1), run, overwrite=True)
    assert content(run) == before


def test_old_run_that_cannot_be_deleted_is_named(run, monkeypatch, caplog):
    rmtree = shutil.rmtree

    def failing(path, **keywords):
        if ".old-" in Path(path).name:
            raise OSError(errno.EACCES, "Permission denied")
        rmtree(path, **keywords)

    before = content(run)
    monkeypatch.setattr(shutil, "rmtree", failing)
    run_training(short(seed=1), run, overwrite=True)
    (old,) = run.parent.glob("run.old-*")
    assert str(old) in caplog.text
    assert content(old) == before
    run.rename(run.with_name("elsewhere"))
    with pytest.raises(ConfigError, match=f"not a run to resume: .*; {old} is what was to be overwritten"):
        run_training(short(), run, resume=True)


def test_a_link_to_a_run_stays_a_link(run):
    link = run.with_name("link")
    link.symlink_to(run)
    run_training(short(seed=1), link, overwrite=True)
    assert link.is_symlink()
    assert load_config(run / CONFIG).seed == 1
    assert sorted(path.name for path in run.parent.iterdir()) == ["link", "run"]


# Paths


def test_relative_paths_mean_the_same_from_another_folder(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--out=run", "--data=data.npz", *SIZE]) == 0
    assert cli.main(["train", "--out=next", "--data=data.npz", "--init=run", *SIZE]) == 0
    assert load_config(tmp_path / "next" / CONFIG).model.init == tmp_path / "run"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert cli.main(["train", "--out=../next", "--resume", "--steps=4"]) == 0
    assert cli.main(["probe", "../next", "--samples=16", "--times", "0.5"]) == 0


def test_relative_paths_in_a_file_of_before_work_from_the_same_folder(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--out=run", "--data=data.npz", *SIZE]) == 0
    path = tmp_path / "run" / CONFIG
    path.write_text(path.read_text().replace(str(data), "data.npz"))
    assert cli.main(["train", "--out=run", "--resume", "--steps=4"]) == 0
    train = load_config(path)
    assert train.data.data == str(data)
    config = CompareConfig(train, ("vanilla", "layersync"), seeds=1, marks=1, quality_network="none")
    prepare(config, tmp_path / "out")
    path = tmp_path / "out" / SETTINGS
    path.write_text(path.read_text().replace(str(data), "data.npz"))
    relative = dataclasses.replace(train, data=dataclasses.replace(train.data, data="data.npz"))
    prepare(dataclasses.replace(config, train=relative), tmp_path / "out")


@pytest.mark.parametrize("name", NAMED_SETS)
def test_names_are_no_paths(tmp_path, monkeypatch, name):
    """Not even where a folder is called so; and where it keeps its files is one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    config = with_absolute_paths(short(data={"data": name}))
    assert config.data.data == name
    assert list(paths_in(config)) == [("--data-root", tmp_path / "data")]
    kinds = [kind for kind in KINDS if kind.takes(name)]
    assert kinds[0].expected == name
