from __future__ import annotations

import argparse
import errno
import os
import pickle
import shutil
import subprocess

import pytest
import torch

from layersync_kernels.errors import CheckpointError
from layersync_kernels.sit.checkpoints import local as checkpoint
from layersync_kernels.sit.checkpoints.local import (
    list_checkpoints,
    load_optimizer,
    optimizer_tensors,
    read_state,
    read_tensors,
    save_checkpoint,
)
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


def test_full_disk_keeps_the_last_good_checkpoint_and_no_debris(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(tensors, path):
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

    def killed(tensors, path):
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
    load_optimizer(other, names, tensors)
    for p, q in zip(other_params, params, strict=True):
        p.grad = q.grad
    optimizer.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, other_params, strict=True))
    with pytest.raises(CheckpointError, match="no parameter of this model"):
        load_optimizer(other, names, {"stranger.exp_avg": torch.zeros(1)})


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
    assert torch.equal(load_weights(tmp_path / "0000100.pt", ema=False).tensors[name], model[name])


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
