"""A checkpoint is whole, of one step, and checked; or it is refused by name. So is a run that lost its own."""

from __future__ import annotations

import errno
import json
import logging
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layersync_kernels.errors import CheckpointError, ConfigError, UserError
from layersync_kernels.sit.checkpoints import local
from layersync_kernels.sit.checkpoints.local import DamagedCheckpoint, list_checkpoints, newest_checkpoint
from layersync_kernels.sit.checkpoints.state import read_run_state
from layersync_kernels.sit.commands.train import run_training
from layersync_kernels.sit.config.io import load_config
from layersync_kernels.sit.data.base import EpochShuffle, write_broken
from layersync_kernels.sit.files import sha256
from layersync_kernels.sit.sampling.load import load_trained
from layersync_kernels.sit.studies.compare.folder import read_marks
from layersync_kernels.sit.training import runlog
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.runlog import read_records

from .tiny import tiny_config, tiny_data

LOG = {"sample_every": 0}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr("layersync_kernels.sit.training.loop.load_data", lambda config, device: tiny_data())
    monkeypatch.setattr(runlog.RunLog, "draw_curves", lambda self: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints of the steps 4 and 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layersync_kernels.sit.training.loop.load_data", lambda config, device: tiny_data())
        patch.setattr(runlog.RunLog, "draw_curves", lambda self: None)
        run = tmp_path_factory.mktemp("trained") / "run"
        run_training(tiny_config(optim={"steps": 8}, log=LOG), run)
    return run


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def rewrite(checkpoint, change=lambda state: None, *, old=False):
    """Makes the state fit the files again, as somebody would who means it; `old`: as before there were checksums."""
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    del state["checksums"], state["digest"]
    if not old:
        state["checksums"] = {p.name: sha256(p) for p in checkpoint.glob("*.safetensors")}
        state["digest"] = local._digest(state)
    (checkpoint / "state.json").write_text(json.dumps(state))


def edit(path, change):
    """Changes the tensors of a file, by name."""
    with safe_open(path, "pt") as file:
        label = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, label)
    rewrite(path.parent)


def resume(run):
    return run_training(tiny_config(log=LOG), run, resume=True)


def swap(run):
    model, ema = (run / f"checkpoints/step_00000008/{stem}.safetensors" for stem in ("model", "ema"))
    content = model.read_bytes()
    model.write_bytes(ema.read_bytes())
    ema.write_bytes(content)


def bring_optimizer_of_step_4(run):
    newest = run / "checkpoints/step_00000008"
    shutil.copy(run / "checkpoints/step_00000004/optimizer.safetensors", newest)


def bring_model_of_another_run(run):
    other = run.parent / "other"
    run_training(tiny_config(optim={"steps": 8}, log=LOG, seed=1), other)
    shutil.copy(other / "checkpoints/step_00000008/model.safetensors", run / "checkpoints/step_00000008")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap, r"ema\.safetensors: it belongs elsewhere: its file is model, not ema"),
        (bring_optimizer_of_step_4, r"optimizer\.safetensors: it belongs elsewhere: its step is 4, not 8"),
        (bring_model_of_another_run, r"model\.safetensors: it belongs elsewhere: its run is"),
    ],
)
def test_file_of_another_place_is_set_aside_though_all_checksums_fit(run, caplog, damage, message):
    damage(run)
    rewrite(run / "checkpoints/step_00000008")
    assert newest_checkpoint(run).name == "step_00000004"
    assert "damaged-step_00000008" in caplog.text
    with pytest.raises(DamagedCheckpoint, match=message):
        local.check_checkpoint(run / "checkpoints/damaged-step_00000008")


def test_folder_of_another_step_is_set_aside(run, caplog):
    shutil.rmtree(run / "checkpoints/step_00000008")
    shutil.copytree(run / "checkpoints/step_00000004", run / "checkpoints/step_00000012")
    assert newest_checkpoint(run).name == "step_00000004"
    assert "it is that of step 4, and the folder's name says 12" in caplog.text


BLOCK = "blocks.1.attn.qkv.weight"


def lose_a_block(tensors):
    for name in [name for name in tensors if name.startswith("blocks.2.")]:
        del tensors[name]


def replace(name, change):
    def edited(tensors):
        tensors[name] = change(tensors[name])

    return edited


@pytest.mark.parametrize(
    ("stem", "change", "message"),
    [
        ("model", replace(BLOCK, lambda w: w.to(torch.int8)), "torch.int8, the model has torch.float32"),
        ("ema", replace(BLOCK, lambda w: w.double()), "torch.float64, the model has torch.float32"),
        ("model", replace(BLOCK, lambda w: w.clone().index_fill_(0, torch.tensor(3), float("nan"))), "is not finite"),
        ("optimizer", dict.clear, r"that of 0 of \d+ parameters"),
        ("optimizer", lose_a_block, r"that of \d+ of \d+ parameters; 'blocks\.2.*missing"),
        ("optimizer", replace(f"{BLOCK}.exp_avg", lambda m: torch.zeros(1)), r"float32 \(1,\); expected .*\(48, 16\)"),
        ("optimizer", replace(f"{BLOCK}.exp_avg_sq", lambda m: torch.zeros(1)), r"\(1,\); expected .*\(48, 16\)"),
        ("optimizer", replace(f"{BLOCK}.exp_avg", lambda m: m.to(torch.int32)), "int32"),
        ("optimizer", replace(f"{BLOCK}.exp_avg", lambda m: m / 0), "numbers in .* that cannot be"),
        ("optimizer", replace(f"{BLOCK}.exp_avg_sq", lambda m: -1 - m), "numbers in .* that cannot be"),
        ("optimizer", replace(f"{BLOCK}.step", lambda m: torch.zeros(3)), r"\(3,\); expected torch.float32 \(\)"),
        ("optimizer", replace(f"{BLOCK}.step", lambda m: m + 1), "is of step 9, the run at 8"),
        ("optimizer", replace(f"{BLOCK}.step", lambda m: m - 1), "of several steps"),
        ("optimizer", replace(f"{BLOCK}.step", lambda m: m - 0.5), r"is of step 7\.5"),
        ("optimizer", lambda tensors: tensors.pop(f"{BLOCK}.step"), "no step of"),
        ("optimizer", lambda tensors: tensors.update(odd=torch.zeros(1)), "no parameter of this model"),
        ("rng", replace("cpu", lambda state: state[:100]), r"'cpu' is torch.uint8 \(100,\); on this cpu it is"),
        ("rng", replace("noise", lambda state: state.float()), "'noise' is torch.float32"),
        ("rng", dict.clear, "it has no 'cpu'"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_they_are_used(run, stem, change, message):
    path = run / f"checkpoints/step_00000008/{stem}.safetensors"
    edit(path, change)
    with pytest.raises(CheckpointError, match=rf"{stem}\.safetensors.*{message}"):
        resume(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_seen": -1}, "samples_seen -1"),
        ({"samples_seen": 2**70}, "samples_seen is 1180591620717411303424; expected int"),
        ({"samples_seen": None}, "samples_seen is None; expected int"),
        ({"seconds": -1.0}, r"seconds is -1\.0"),
        ({"seconds": float("nan")}, "NaN is no number"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"seconds": "long"}, "seconds is 'long'; expected float"),
        ({"step": 8.0}, r"step is 8\.0; expected int"),
        ({"scaler": {"scale": 1.0}}, "scaler.missing"),
        ({"scaler": [1]}, "scaler is"),
        ({"data": {"shape": [], "num_classes": 3, "class_names": [], "latent": False}}, r"data.shape is \(\)"),
        ({"data": {"shape": [1, 4, -4], "num_classes": 3, "class_names": [], "latent": False}}, "all positive"),
        ({"data": 5}, "expected an object"),
        ({"extra": 1}, "unknown settings"),
    ],
)
def test_state_that_no_run_saves_is_refused(run, change, message):
    checkpoint = run / "checkpoints/step_00000008"
    rewrite(checkpoint, lambda state: state.update(change))
    with pytest.raises(CheckpointError, match=rf"state\.json.*{message}"):
        read_run_state(checkpoint)


@pytest.mark.parametrize("text", ["[" * 10**5, "9" * 10**4, "\xff", '{"digest": "x", "checksums": [1]}', "null"])
def test_state_that_is_no_json_object_is_damage(run, text):
    (run / "checkpoints/step_00000008/state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        read_run_state(run / "checkpoints/step_00000008")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [1, 2**20, 2**20]}, r"its tokens is 4,.* say 274877906944"),
        ({"shape": [2**40, 4, 4]}, "its channels is 1"),
        ({"num_classes": 2**40}, "its rows is 4"),
    ],
)
def test_sizes_in_the_state_are_compared_with_the_weights_before_a_model_is_built(run, change, message):
    checkpoint = run / "checkpoints/step_00000008"
    rewrite(checkpoint, lambda state: state["data"].update(change))
    with pytest.raises(CheckpointError, match=message):
        load_trained(checkpoint)


@pytest.mark.parametrize(("name", "size"), [("hidden_size", 2**30), ("depth", 2**40), ("patch_size", 2**20)])
def test_sizes_in_the_config_are_compared_with_the_weights_before_a_model_is_built(run, name, size):
    config = json.loads((run / "config.json").read_text())
    config["model"][name] = size
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"its {name.replace('_', ' ')} is"):
        load_trained(run)


def test_few_weights_cannot_declare_a_large_model(run, tmp_path):
    tensors = load_file(run / "checkpoints/step_00000008/ema.safetensors")
    tensors["blocks.999999.odd"] = torch.zeros(1)
    save_file(tensors, tmp_path / "lone.safetensors")
    with pytest.raises(CheckpointError, match="1000000 blocks of width 16 have at least"):
        load_trained(tmp_path / "lone.safetensors", num_heads=2)


def test_checkpoint_of_an_earlier_version_goes_on_as_one_of_today(run):
    shutil.copytree(run, run.parent / "old")
    old = run.parent / "old/checkpoints/step_00000008"
    for path in old.glob("*.safetensors"):
        save_file(load_file(path), path)
    rewrite(old, lambda state: state.pop("run"), old=True)
    for folder in (run, run.parent / "old"):
        resume(folder)
    for stem in ("model", "ema", "optimizer", "rng"):
        new, before = (load_file(list_checkpoints(f)[-1] / f"{stem}.safetensors") for f in (run, run.parent / "old"))
        assert new.keys() == before.keys()
        assert all(torch.equal(new[name], before[name]) for name in new)


def test_a_run_keeps_its_mark_and_another_run_has_another(run, trained):
    resume(run)
    marks = {read_run_state(checkpoint).run for checkpoint in list_checkpoints(run)}
    assert len(marks) == 1
    assert Trainer(tiny_config(), tiny_data()).state.run not in marks


def test_fp16_goes_on_from_another_precision_with_scaling_begun_anew(run):
    trainer = Trainer(tiny_config(precision="fp16"), tiny_data(), run_dir=run)
    trainer.load(run / "checkpoints/step_00000008")
    assert trainer.state.scaler.get_scale() == 2.0**16


def test_stream_has_no_position_below_zero():
    with pytest.raises(ValueError, match="no position -1"):
        EpochShuffle(4, seed=0).indices(-1, 2)


# A run that lost its checkpoints


def test_run_that_lost_its_checkpoints_is_not_begun_anew_in_silence(run):
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"records up to step 8, but no checkpoint.*--overwrite"):
        resume(run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_run_that_has_recorded_nothing_begins_anew(run):
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_text("")
    assert resume(run).step == 12


# Records


DAMAGED = [
    b"\xff\xfe\x00binary",
    b'{"step": 2, "loss": 0.5',
    b'{"step": 4, "loss": NaN}',
    b'{"step": 4, "loss": 1e999}',
    b'{"step": 4, "loss": 1.0, "cosine": {"1:2": 1e999}}',
    b"[1, 2]",
    b"null",
    b'{"step": "4", "loss": 1.0}',
    b'{"step": 4, "loss": 1.0, "cosine": 3}',
    b'{"step": 4, "loss": 1.0, "grad_norm": "x"}',
    b'{"step": -4, "loss": 1.0}',
    b'{"loss": 1.0}',
    b"[" * 10**5,
    b"9" * 10**4,
    b"",
]


def test_damaged_records_are_left_out_and_counted_once(run, caplog):
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    mixed = [line for pair in zip(DAMAGED, lines * 4, strict=False) for line in pair]
    (run / "metrics.jsonl").write_bytes(b"\n".join(mixed))
    with caplog.at_level(logging.WARNING):
        assert resume(run).step == 12
    told = [record.getMessage() for record in caplog.records if "are no records" in record.getMessage()]
    assert len(told) == 1
    assert f"{len(DAMAGED)} lines are no records and are left out (line 1: " in told[0]
    assert {record["step"] for record in read_records(run)} == {2, 4, 6, 8, 10, 12}


def test_record_that_does_not_fit_on_the_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("whole\n")
    real_open = type(path).open

    def short(self, *arguments, **keywords):
        file = real_open(self, *arguments, **keywords)

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, content):
                return file.write(content[:3])  # what a raw file does that finds room for no more

            def __getattr__(self, name):
                return getattr(file, name)

        return Full()

    monkeypatch.setattr(type(path), "open", short)
    with pytest.raises(OSError, match="No space left"):
        runlog._append(path, "another\n")
    monkeypatch.undo()
    assert path.read_text() == "whole\n"


# A full disk


def full_for(monkeypatch, name):
    """Writes end with ENOSPC in files whose name contains `name`."""
    from layersync_kernels.sit import files

    flush = files.flush

    def full(path):
        if name in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(files, "flush", full)


def contents(run):
    """All files but the config, which is written first and has the settings of this attempt."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "config.json"}


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_full_disk_at_a_resume_is_an_error_that_loses_nothing(run, monkeypatch, name):
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b'{"step": 10, "loss": 1.0}\n')
    before = contents(run)
    full_for(monkeypatch, name)
    with pytest.raises(UserError, match=r"No space left"):
        resume(run)
    assert contents(run) == before
    assert load_config(run / "config.json").optim.steps in (8, 12)


def test_full_disk_does_not_stop_a_run_that_has_broken_files(tmp_path, monkeypatch, caplog):
    full_for(monkeypatch, "broken_files.txt")
    write_broken(tmp_path, {"a.png": "it is broken"})
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_records_that_need_no_trimming_are_not_written_again(run, monkeypatch):
    full_for(monkeypatch, "metrics.jsonl")
    assert resume(run).step == 12


# Other files of JSON


def test_seed_beyond_what_generators_take_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--seed 1180591620717411303424: expected a number below 2\*\*63"):
        run_training(tiny_config(seed=2**70), tmp_path / "run")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[1]",
        '[{"step": 0}]',
        '[{"step": -1, "seconds": 0.0, "validation_loss": 1.0, "frechet": null}]',
        '[{"step": 0, "seconds": 0.0, "validation_loss": NaN, "frechet": null}]',
        '[{"step": 0, "seconds": 0.0, "validation_loss": 1.0, "frechet": "x"}]',
        '[{"step": 0, "seconds": 0.0, "validation_loss": 1.0, "frechet": null, "loss": []}]',
        '[{"step": 2, "seconds": 0.0, "validation_loss": 1.0, "frechet": null}, '
        '{"step": 1, "seconds": 0.0, "validation_loss": 1.0, "frechet": null}]',
    ],
)
def test_marks_that_no_comparison_writes_are_refused(tmp_path, text):
    (tmp_path / "marks.json").write_text(text)
    with pytest.raises(ValueError, match=r"mark|quality|order"):
        read_marks(tmp_path / "marks.json")
