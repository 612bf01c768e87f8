from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import pickle
import shutil
import subprocess

import pytest
import torch

from layersync_kernels.errors import CheckpointError
from layersync_kernels.sit.checkpoints import local as checkpoint
from layersync_kernels.sit.checkpoints.local import (
    DamagedCheckpoint,
    check_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    read_state,
    read_tensors,
    save_checkpoint,
)
from layersync_kernels.sit.checkpoints.optimizer import load_optimizer, optimizer_tensors
from layersync_kernels.sit.checkpoints.weights import Weights, fill_model, find_weights, load_weights
from layersync_kernels.sit.files import atomic_path
from layersync_kernels.sit.models.sit import SiT


def tiny_model():
    return SiT(4, 2, 1, hidden_size=8, depth=2, num_heads=2, num_classes=3)


def save(run, step, value=None, keep=2):
    tensors = {"model": {"w": torch.full((4,), float(step if value is None else value))}}
    return save_checkpoint(run, step, tensors, {"step": step}, keep=keep)


# Writing


def test_round_trip_is_exact(tmp_path):
    tensors = {"model": {"a": torch.randn(3, 4).t(), "b": torch.arange(3, dtype=torch.uint8)}, "rng": {}}
    path = save_checkpoint(tmp_path, 7, tensors, {"step": 7, "note": [1.5, None]})
    assert path.name == "step_00000007"
    read = read_tensors(path / "model.safetensors")
    assert torch.equal(read["a"], tensors["model"]["a"])
    assert torch.equal(read["b"], tensors["model"]["b"])
    assert read_state(path) == {"step": 7, "note": [1.5, None]}


def test_only_the_newest_are_kept_in_order_of_steps(tmp_path):
    for step in (100_000_000, 5, 99_999_999, 20):
        save(tmp_path, step, keep=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000020", "step_99999999", "step_100000000"]


def test_every_so_many_steps_one_stays_for_good(tmp_path):
    for step in range(1, 9):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.zeros(1)}}, {}, keep=2, keep_every=3)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [3, 6, 7, 8]


def test_full_disk_keeps_the_last_good_checkpoint_and_no_debris(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step_00000002: .*No space left.*last good .*step_00000001"):
        save(tmp_path, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert read_tensors(find_weights(tmp_path) / "model.safetensors")["w"].eq(1).all()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_truly_full_disk(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        save(tmp_path, 1)
        big = {"model": {"w": torch.zeros(1_000_000)}}
        with pytest.raises(CheckpointError, match=r"No space left.*step_00000001"):
            save_checkpoint(tmp_path, 2, big, {})
        assert read_tensors(find_weights(tmp_path) / "model.safetensors")["w"].eq(1).all()
        save(tmp_path, 3)  # the failed attempt has given its space back
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_crash_while_writing_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def killed(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt  # not an error that is cleaned up after, like SIGKILL

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001"]
    save(tmp_path, 3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000003"]


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "picture.png"
    target.write_text("old")

    def write():
        with atomic_path(target) as temporary:
            temporary.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("picture.png", "old")]


# The optimiser


def test_optimizer_state_round_trip_by_parameter_name():
    def make():
        torch.manual_seed(0)
        model = tiny_model()
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return [n for n, _ in named], [p for _, p in named], torch.optim.AdamW([p for _, p in named], lr=0.1)

    names, params, optimizer = make()
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, names).items()}
    assert "blocks.1.attn.qkv.weight.exp_avg_sq" in tensors

    _, other_params, other = make()
    with torch.no_grad():
        for p, q in zip(other_params, params, strict=True):
            p.copy_(q)
    load_optimizer(other, names, tensors, step=1)
    for p, q in zip(other_params, params, strict=True):
        p.grad = q.grad
    optimizer.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, other_params, strict=True))
    with pytest.raises(CheckpointError, match="no parameter of this model"):
        load_optimizer(other, names, {"stranger.exp_avg": torch.zeros(1)}, step=1)


# Damage


STEMS = ("model", "ema", "optimizer", "rng", "projector")
FILES = (*(f"{stem}.safetensors" for stem in STEMS), "state.json")


def save_whole(run, step, keep=2):
    tensors = {stem: {"w": torch.full((64,), step + i / 8)} for i, stem in enumerate(STEMS)}
    state = {"step": step, "samples_seen": 64 * step, "seconds": 0.1 * step, "data": {"class_names": ["a", "ü"]}}
    return save_checkpoint(run, step, tensors, state, keep=keep)


def strip_checksums(checkpoint):
    """Makes it what was saved before checkpoints had checksums."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["checksums"], state["digest"]
    (checkpoint / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def read_all(checkpoint):
    read_state(checkpoint)
    for file in FILES[:-1]:
        read_tensors(checkpoint / file)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip_bit(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_flipped_bit_in_any_file_is_an_error_that_names_it(tmp_path, file, where):
    save_whole(tmp_path, 1)
    checkpoint = save_whole(tmp_path, 2)
    bits = 8 * (checkpoint / file).stat().st_size
    flip_bit(checkpoint / file, round(where * (bits - 1)))
    for read in (check_checkpoint, read_all):
        with pytest.raises(DamagedCheckpoint, match=rf"step_00000002.{file}"):
            read(checkpoint)
    with pytest.raises(DamagedCheckpoint, match=r"to go on from .*step_00000001"):
        read_all(checkpoint)


def test_every_single_flipped_bit_of_the_state_is_found(tmp_path):
    """Also one in the names of its checksums, which must not turn it into an old checkpoint that has none."""
    state = {"step": 1, "seconds": 0.1, "name": "ü"}
    checkpoint = save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(1)}}, state)
    whole = (checkpoint / "state.json").read_bytes()
    harmless = []
    for bit in range(8 * len(whole)):
        flip_bit(checkpoint / "state.json", bit)
        with contextlib.suppress(DamagedCheckpoint):
            assert read_state(checkpoint) == state
            harmless.append(bit)
        (checkpoint / "state.json").write_bytes(whole)
    escape = whole.index(rb"\u00fc")
    assert harmless == [8 * (escape + i) + 5 for i in (4, 5)]  # F and C mean the same there


def test_weights_of_a_run_are_checked(tmp_path):
    checkpoint = save_whole(tmp_path, 1)
    flip_bit(checkpoint / "ema.safetensors", 8 * 200)
    for path in (tmp_path, checkpoint, checkpoint / "ema.safetensors"):
        with pytest.raises(DamagedCheckpoint, match=r"ema\.safetensors: it is damaged"):
            load_weights(path)
    assert load_weights(tmp_path, which="model").tensors["w"].eq(1).all()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-2]), lambda path: path.unlink()])
def test_truncated_or_missing_file_is_named(tmp_path, file, damage):
    checkpoint = save_whole(tmp_path, 1)
    damage(checkpoint / file)
    for read in (check_checkpoint, read_all):
        with pytest.raises(DamagedCheckpoint, match=file):
            read(checkpoint)


def test_extra_files_are_named_and_not_read(tmp_path, caplog):
    checkpoint = save_whole(tmp_path, 1)
    shutil.copy(checkpoint / "ema.safetensors", checkpoint / "critic.safetensors")
    with caplog.at_level(logging.WARNING):
        check_checkpoint(checkpoint)
    assert "files that were not saved with it: critic.safetensors" in caplog.text
    with pytest.raises(DamagedCheckpoint, match=r"critic\.safetensors: it was not saved with this checkpoint"):
        read_tensors(checkpoint / "critic.safetensors")


def test_checkpoint_from_before_checksums_is_read_and_said_to_be_unchecked_once(tmp_path, caplog):
    checkpoint = save_whole(tmp_path, 1)
    strip_checksums(checkpoint)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            check_checkpoint(checkpoint)
            assert read_state(checkpoint)["step"] == 1
            assert load_weights(checkpoint).tensors["w"].eq(1.125).all()
    assert caplog.text.count("read unchecked") == 1
    (checkpoint / "ema.safetensors").write_bytes((checkpoint / "ema.safetensors").read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=r"ema\.safetensors"):
        check_checkpoint(checkpoint)


def test_damaged_newest_checkpoints_are_set_aside_for_the_one_before(tmp_path, caplog):
    for step in (1, 2, 3):
        save_whole(tmp_path, step, keep=3)
    flip_bit(tmp_path / "checkpoints/step_00000003/rng.safetensors", 8 * 100)
    (tmp_path / "checkpoints/step_00000002/model.safetensors").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints/step_00000001"
    assert names(tmp_path) == ["damaged-step_00000002", "damaged-step_00000003", "step_00000001"]
    assert "rng.safetensors: it is damaged" in caplog.text
    assert "lost model.safetensors" in caplog.text
    for step in (2, 3):  # the same steps anew; what was set aside neither counts nor goes
        save_whole(tmp_path, step)
    assert names(tmp_path) == ["damaged-step_00000002", "damaged-step_00000003", "step_00000002", "step_00000003"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints/step_00000003"


def test_damage_in_an_older_checkpoint_disturbs_nothing(tmp_path):
    save_whole(tmp_path, 1)
    save_whole(tmp_path, 2)
    flip_bit(tmp_path / "checkpoints/step_00000001/model.safetensors", 8 * 100)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints/step_00000002"
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_nothing_is_touched_when_every_checkpoint_is_damaged(tmp_path):
    for step in (1, 2):
        flip_bit(save_whole(tmp_path, step) / "model.safetensors", 8 * 100)
    with pytest.raises(DamagedCheckpoint, match=r"every .*step_00000002.model.*step_00000001.model.*begin anew"):
        newest_checkpoint(tmp_path)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_run_without_checkpoints_has_no_newest(tmp_path):
    assert newest_checkpoint(tmp_path) is None


def test_step_that_is_there_is_replaced_only_if_damaged(tmp_path):
    checkpoint = save(tmp_path, 2)
    save(tmp_path, 2, value=7)
    assert read_tensors(checkpoint / "model.safetensors")["w"].eq(2).all()
    for _ in range(2):
        flip_bit(checkpoint / "model.safetensors", 8 * 70)
        save(tmp_path, 2)
        assert read_tensors(checkpoint / "model.safetensors")["w"].eq(2).all()
    assert names(tmp_path) == ["damaged-step_00000002", "damaged-step_00000002-2", "step_00000002"]


# Reading what is damaged or foreign


def test_truncated_safetensors_names_the_file_and_the_older_checkpoint(tmp_path):
    save(tmp_path, 1)
    newest = save(tmp_path, 2) / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"step_00000002.model\.safetensors.*to go on from .*step_00000001"):
        read_tensors(newest)


def test_damaged_state_names_the_file(tmp_path):
    path = save(tmp_path, 1)
    (path / "state.json").write_text('{"step": 1')
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_state(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x02garbage", b"PK\x03\x04" + bytes(100), b"hello, this is text"])
def test_foreign_bytes_name_the_file(tmp_path, content):
    (tmp_path / "foreign.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot read .*foreign\.pt"):
        load_weights(tmp_path / "foreign.pt")


def test_truncated_published_checkpoint_names_the_file(tmp_path):
    torch.save({"ema": tiny_model().state_dict()}, tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.pt.*truncated"):
        load_weights(tmp_path / "cut.pt")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (os.environ["BOMB_PATH"],))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_never_run(tmp_path, monkeypatch, legacy):
    monkeypatch.setenv("BOMB_PATH", str(tmp_path / "exploded"))
    if legacy:
        (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"ema": Bomb()}, protocol=2))
    else:
        torch.save({"ema": tiny_model().state_dict(), "args": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match=r"bomb\.pt.*never unpickled"):
        load_weights(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"ema": {"w": "text"}}, {"optimizer": {"lr": 1.0}}, {"args": argparse.Namespace()}]
)
def test_checkpoint_of_another_kind_is_explained(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt (holds a|is no SiT checkpoint)"):
        load_weights(tmp_path / "other.pt")


# Published layout


def test_published_layout_gives_averaged_or_last_weights_and_args(tmp_path):
    model, ema = tiny_model().state_dict(), tiny_model().state_dict()
    content = {"model": model, "ema": ema, "opt": {"state": {}}, "args": argparse.Namespace(model="SiT-XL/2", lr=0.1)}
    torch.save(content, tmp_path / "0000100.pt")
    read = load_weights(tmp_path / "0000100.pt")
    assert read.args == {"model": "SiT-XL/2", "lr": 0.1}
    name = "x_embedder.proj.weight"
    assert torch.equal(read.tensors[name], ema[name])
    assert torch.equal(load_weights(tmp_path / "0000100.pt", which="model").tensors[name], model[name])


def test_bare_state_dict_and_wrapper_prefixes(tmp_path):
    state = tiny_model().state_dict()
    torch.save({f"module._orig_mod.{k}": v for k, v in state.items()}, tmp_path / "bare.pt")
    model = tiny_model()
    fill_model(model, load_weights(tmp_path / "bare.pt"))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_weights_of_another_model_name_file_and_differences(tmp_path):
    state = tiny_model().state_dict()
    state["x_embedder.proj.bias"] = torch.zeros(9)
    state["stranger"] = state.pop("pos_embed")
    with pytest.raises(CheckpointError, match=r"w\.pt does not fit.*missing pos_embed.*\(9,\).*unexpected stranger"):
        fill_model(tiny_model(), Weights(state, tmp_path / "w.pt"))


# Finding


def test_find_weights_takes_runs_folders_and_files(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        find_weights(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_weights(tmp_path)
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    shutil.copytree(newest, tmp_path / "elsewhere")
    assert find_weights(tmp_path) == newest
    assert find_weights(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    assert find_weights(newest / "model.safetensors") == newest / "model.safetensors"
