"""Tar files, data sets of Hugging Face, CIFAR-10 in one file, and a user's own data."""

import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layersync_kernels import cli
from layersync_kernels.errors import ConfigError, DataError
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.data.streaming import StreamingSet


def packed(grey, kind="PNG", size=(6, 4)):
    file = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(file, format=kind)
    return file.getvalue()


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def load(name, **options):
    return load_data(DataConfig(**({"data": name, "image_size": 4, "workers": 0} | options)))


def brightness(data):
    batch = data.take(torch.arange(len(data)))
    return ((batch.samples.mean((1, 2, 3)) + 1) * 127.5).round().int().tolist()


# Tar files


def test_tar_files_give_images_classes_and_captions(tmp_path):
    tar(tmp_path / "x-000.tar", {"a.png": packed(0), "a.cls": b"2", "a.txt": b"black", "dir/b.jpg": packed(255, "JPEG"),
                                 "dir/b.cls": b"0", "dir/b.txt": b"white", "c.txt": b"no image"})  # fmt: skip
    described = json.dumps({"label": 1, "caption": "grey"}).encode()
    tar(tmp_path / "x-001.tar", {"a.png": packed(100), "a.json": described})
    for name in (str(tmp_path), str(tmp_path / "x-{000..001}.tar")):
        data = load(name, text_encoder="hashed")
        assert data.labels.tolist() == [2, 0, 1]
        assert data.class_names == ["0", "1", "2"]
        assert brightness(data) == [0, 255, 100]
        assert data.captions == ("black", "white", "grey")
        assert data.text.shape[0] == len(data.text_lengths) == 3
        assert data.text_width == data.text.shape[2]
    assert load(str(tmp_path / "x-001.tar")).text is None


def test_classes_may_be_words(tmp_path):
    members = {f"{i}.png": packed(i) for i in range(3)}
    members |= {f"{i}.json": json.dumps({"label": word}).encode() for i, word in enumerate(["cat", "ant", "cat"])}
    data = load(tar(tmp_path / "x.tar", members))
    assert data.class_names == ["ant", "cat"]
    assert data.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"a.txt": b"x"}, "holds no images"),
        ({"a.png": packed(0), "a.cls": b"cat"}, "what describes it cannot be read"),
        ({"a.png": packed(0), "a.json": b"{"}, "what describes it cannot be read"),
        ({"a.png": packed(0), "a.cls": b"1", "b.png": packed(1)}, r"b has the class None, others have one"),
        ({"a.png": packed(0), "a.cls": b"-1"}, "has the class -1"),
        ({"a.png": packed(0), "a.cls": b"9999999"}, "classes go up to 9999999"),
        ({"a.png": b"no image"}, "none of the 1 image files can be read"),
    ],
)
def test_bad_tar_files_are_named(tmp_path, members, match):
    with pytest.raises(DataError, match=match):
        load(tar(tmp_path / "x.tar", members))


def test_tar_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"cannot read .*x\.tar"):
        load(str(tmp_path / "x.tar"))
    with pytest.raises(DataError, match=r"cannot read .*y-0\.tar"):
        load(str(tmp_path / "y-{0..1}.tar"))


def test_captions_that_are_missing_or_not_there_at_all(tmp_path):
    name = tar(tmp_path / "x.tar", {"a.png": packed(0), "a.txt": b"black", "b.png": packed(1)})
    with pytest.raises(DataError, match=r":b has no caption, which --text-encoder hashed needs"):
        load(name, text_encoder="hashed")
    with pytest.raises(DataError, match=r"--text-encoder hashed: .* has no captions"):
        load("mnist", image_size=14, text_encoder="hashed")


def test_equal_captions_have_equal_embeddings_which_the_memory_limit_counts(tmp_path):
    captions = {"a.txt": b"dark", "b.txt": b"word " * 64, "c.txt": b"dark"}
    name = tar(tmp_path / "x.tar", {f"{key}.png": packed(0) for key in "abc"} | captions)
    data = load(name, text_encoder="hashed")
    assert data.captions == ("dark", captions["b.txt"].decode().strip())
    assert data.text_lengths.tolist() == [1, 64, 1]
    assert torch.equal(data.text[0], data.text[2])
    limit = {"memory_limit_gb": 0.9 * data.text.nbytes / 2**30}
    assert len(load(name, **limit)) == 3
    with pytest.raises(DataError, match="embeddings of 3 captions, 64 x 128 each"):
        load(name, text_encoder="hashed", **limit)


def test_broken_images_in_tar_files_take_their_captions_along(tmp_path):
    members = {"a.png": b"broken", "a.txt": b"one", "b.png": packed(9), "b.txt": b"two"}
    data = load(tar(tmp_path / "x.tar", members), text_encoder="hashed")
    assert data.captions == ("two",)
    assert len(data.text) == len(data) == 1
    assert len(data.broken) == 1


# Hugging Face


@pytest.fixture
def hub(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["dark", "light"]),
            "words": datasets.Value("string"),
        }
    )
    rows = {
        "picture": [Image.new("RGB", (6, 4), (grey,) * 3) for grey in (0, 200, 10)],
        "kind": [0, 1, 0],
        "words": ["very dark", "light", "dark"],
    }
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(tmp_path / "split")
    return tmp_path


def test_columns_are_found_by_what_they_hold(hub):
    data = load(f"hf:{hub / 'one'}", text_encoder="hashed")
    assert data.class_names == ["dark", "light"]
    assert data.labels.tolist() == [0, 1, 0]
    assert brightness(data) == [0, 200, 10]
    assert data.captions == ("very dark", "light", "dark")


def test_splits_of_the_hub_are_taken(hub):
    assert len(load(f"hf:{hub / 'split'}")) == 3


def test_hub_is_asked_with_download_only(hub):
    with pytest.raises(DataError, match="is no folder; add --download"):
        load("hf:nobody/nothing")


def test_missing_datasets_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'layersync_kernels\[datasets\]'"):
        load("hf:any")


# CIFAR-10


def cifar(folder, **changes):
    jpegs = [packed(grey, "JPEG", (32, 32)) for grey in (0, 100, 200)]
    shared = next(n for n in range(len(jpegs[0])) if len({jpeg[: n + 1] for jpeg in jpegs}) > 1)
    bodies = [np.frombuffer(jpeg[shared:], np.uint8) for jpeg in jpegs]
    arrays = {"header": np.frombuffer(jpegs[0][:shared], np.uint8)}
    for split, own in (("train", [0, 1]), ("test", [2])):
        arrays[f"{split}_body"] = np.concatenate([bodies[i] for i in own])
        arrays[f"{split}_len"] = np.array([len(bodies[i]) for i in own])
        arrays[f"{split}_y"] = np.array([3 * i for i in own])
    np.savez(folder / "cifar10_jpeg.npz", **(arrays | changes))


def test_cifar_has_its_classes_and_its_split(tmp_path):
    cifar(tmp_path)
    train, test = (load("cifar10", data_root=tmp_path, image_size=None, split=split) for split in ("train", "test"))
    assert train.spec.shape == (3, 32, 32)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 3], [6])
    assert brightness(train) == [0, 100]
    assert train.class_names[3] == "cat"


@pytest.mark.parametrize(
    "change", [{"train_len": np.array([5])}, {"test_y": np.array([10])}, {"train_len": np.array([9**9, 1])}]
)
def test_damaged_cifar_is_refused(tmp_path, change):
    cifar(tmp_path, **change)
    with pytest.raises(DataError, match="do not fit together"):
        load("cifar10", data_root=tmp_path)


def test_cifar_that_is_not_there_is_torchvision_s(tmp_path):
    with pytest.raises(DataError, match=r"torchvision:CIFAR10 under .*--download"):
        load("cifar10", data_root=tmp_path)


# A user's own


PAGE = Path(__file__).parents[2] / "docs" / "data.md"
MORE = """
def fail(config):
    raise KeyError("no such thing")


def other(config):
    return 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "own_ramps.py").write_text(code + MORE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_ramps", raising=False)
    return tmp_path


def test_a_run_on_a_set_of_ones_own(own, capsys):
    sizes = ["--patch-size=2", "--hidden-size=8", "--num-heads=2", "--depth=3", "--batch-size=4", "--steps=2"]
    latents = ["--sample-every=0", "--no-tensorboard", "--device=cpu", "--precision=fp32"]
    assert cli.main(["train", "--data=own_ramps:make", "--out=run", *sizes, *latents]) == 0
    assert "12 samples of (1, 8)" in capsys.readouterr().err
    # Its settings alone start no code.
    assert cli.main(["train", "--out=run", "--resume", "--steps=4"]) == 1
    err = capsys.readouterr().err
    assert "--data own_ramps:make" in err


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("own_ramps:fail", "KeyError: 'no such thing'"),
        ("own_ramps:other", "returned a int; expected a SampleSet"),
        ("own_ramps:nothing", "AttributeError"),
        ("own_module_that_is_not_there:make", "ModuleNotFoundError"),
    ],
)
def test_what_goes_wrong_in_somebody_s_code_is_told(own, name, match):
    with pytest.raises(DataError, match=match) as error:
        load(name)
    assert name in str(error.value)


# Sizes


@pytest.mark.parametrize("limit", [4.0, 0.0], ids=["memory", "streaming"])
def test_images_that_are_not_square(image_folder, limit):
    data = load(str(image_folder), image_size=(4, 6), memory_limit_gb=limit)
    assert isinstance(data, StreamingSet) == (limit == 0)
    assert data.spec.extent == (4, 6)
    assert next(data.batches(3, seed=0)).samples.shape == (3, 3, 4, 6)


def test_size_that_is_no_size_is_refused():
    with pytest.raises(ConfigError, match="--image-size 0"):
        DataConfig(image_size=(4, 0)).validate()
