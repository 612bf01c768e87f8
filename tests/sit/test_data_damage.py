"""Data files that are damaged, foreign, or hold what no model can be trained on."""

from __future__ import annotations

import io
import itertools
import logging
import os
import struct
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from layersync_kernels.errors import DataError
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.console import start_logging
from layersync_kernels.sit.data import media, memory, pixels
from layersync_kernels.sit.data.base import BROKEN, write_broken
from layersync_kernels.sit.data.registry import load_data

IMAGES = np.arange(2 * 16, dtype=np.uint8).reshape(2, 4, 4)


def load(path, **options):
    return load_data(DataConfig(data=str(path), **options))


# Numbers that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_latents_that_are_not_finite_are_refused_by_the_first_sample(tmp_path, monkeypatch, bad, kind, dtype):
    monkeypatch.setattr(pixels, "CHUNK_VALUES", 3 * 4 * 8 * 8)  # three samples at a time
    latents = torch.randn(11, 4, 8, 8).to(dtype)
    latents[7, 2, 3, 4] = latents[9, 0, 0, 0] = bad
    path = tmp_path / f"l.{kind}"
    if kind == "npz":
        np.savez(path, latents=latents.numpy())
    else:
        save_file({"latents": latents}, path)
    with pytest.raises(DataError, match=rf"l\.{kind}: the latents of sample 7 are not finite"):
        load(path)


def test_latents_that_are_not_finite_as_they_are_handed_out_are_refused(tmp_path):
    latents = torch.ones(3, 4, 2, 2, dtype=torch.float64)
    latents[1] = 1e300  # finite, but not in fp32
    save_file({"latents": latents}, tmp_path / "l.safetensors")
    with pytest.raises(DataError, match="latents of sample 1 are not finite"):
        load(tmp_path / "l.safetensors")
    save_file({"latents": torch.full((3, 4, 2, 2), 1e30)}, tmp_path / "l.safetensors")
    with pytest.raises(DataError, match=r"sample 0 are not finite times --latent-scale 1e\+20"):
        load(tmp_path / "l.safetensors", latent_scale=1e20)


def test_pass_over_latents_takes_pieces(monkeypatch):
    monkeypatch.setattr(pixels, "CHUNK_VALUES", 10)
    latents, largest = torch.zeros(7, 1, 2, 2, dtype=torch.float16), []
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda x: largest.append(x.numel()) or (x.min(), x.max()))
    assert memory.first_not_finite(latents) is None
    assert largest == [8, 8, 8, 4]


# Types


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_latents_of_either_byte_order_are_the_same(tmp_path, order, kind):
    latents = np.random.default_rng(0).normal(size=(3, 4, 2, 2)).astype(order + kind)
    np.savez(tmp_path / "l.npz", latents=latents, labels=np.arange(3, dtype=order + "i4"))
    data = load(tmp_path / "l.npz")
    assert data.labels.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(data.take(torch.arange(3)).samples.numpy(), latents.astype("f4"))


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (np.array(["cat", "dog"]), "<U3"),
        (np.array([b"cat", b"dog"]), r"\|S3"),
        (np.array(["2020-01-01", "2021-01-01"], "M8[D]"), r"datetime64\[D\]"),
        (np.array([1, 2], "m8[s]"), r"timedelta64\[s\]"),
        (np.array([(1, 2.0), (3, 4.0)], [("a", "i4"), ("b", "f4")]), r"\[\('a'"),
        (np.array([b"\x00\x01", b"\x02\x03"], "V2"), r"\|V2"),
        (np.array([0.0, 1.0], ">f4"), "torch.float32"),
        (np.array([0.0, 1.0], np.longdouble), "float128"),
        (np.array([0, 1], np.complex64), "torch.complex64"),
        (np.array([False, True]), "torch.bool"),
    ],
)
def test_labels_that_are_no_integers_are_named_by_their_type(tmp_path, labels, named):
    np.savez(tmp_path / "d.npz", images=IMAGES, labels=labels)
    with pytest.raises(DataError, match=rf"d\.npz: labels are {named}.*; expected integers"):
        load(tmp_path / "d.npz")


@pytest.mark.parametrize("dtype", ["i1", "u1", ">i2", ">u2", "<u4", ">i8", "u8"])
def test_labels_may_be_any_integers(tmp_path, dtype):
    np.savez(tmp_path / "d.npz", images=IMAGES, labels=np.array([1, 0], dtype))
    assert load(tmp_path / "d.npz").labels.tolist() == [1, 0]


@pytest.mark.parametrize("key", ["images", "latents"])
@pytest.mark.parametrize("dtype", ["U4", "S4", "M8[s]", "V4", "f4,i4", "c8", ">c16"])
def test_samples_that_are_no_numbers_are_refused(tmp_path, key, dtype):
    np.savez(tmp_path / "d.npz", **{key: np.zeros((2, 1, 4, 4), dtype)})
    with pytest.raises(DataError, match=rf"d\.npz: {key} are .*; expected"):
        load(tmp_path / "d.npz")


def test_latents_in_eight_bits_are_refused(tmp_path):
    save_file({"latents": torch.zeros(2, 4, 2, 2).to(torch.float8_e4m3fn)}, tmp_path / "l.safetensors")
    with pytest.raises(DataError, match=r"latents are torch\.float8_e4m3fn; expected float16"):
        load(tmp_path / "l.safetensors")


def test_latents_without_channels_are_refused(tmp_path):
    save_file({"latents": torch.zeros(2, 0, 2, 2)}, tmp_path / "l.safetensors")
    with pytest.raises(DataError, match=r"latents have shape \(2, 0, 2, 2\)"):
        load(tmp_path / "l.safetensors")


@pytest.mark.parametrize("label", [10**5, 10**7, 10**9, 2**63 - 1])
def test_label_far_beyond_the_samples_is_refused_before_a_model_has_a_row_for_each(tmp_path, label):
    np.savez(tmp_path / "d.npz", images=IMAGES, labels=np.array([0, label]))
    with pytest.raises(DataError, match=rf"d\.npz: labels go up to {label}, of 2 samples; number the classes from 0"):
        load(tmp_path / "d.npz", memory_limit_gb=1000)


def test_few_samples_of_many_classes_are_fine(tmp_path):
    np.savez(tmp_path / "d.npz", images=IMAGES, labels=np.array([0, 21_840]))
    assert load(tmp_path / "d.npz").num_classes == 21_841


# Archives


def test_array_named_as_an_archive_is_explained(tmp_path):
    with (tmp_path / "d.npz").open("wb") as file:
        np.save(file, IMAGES)
    with pytest.raises(DataError, match=r"d\.npz: cannot be read: File is not a zip file"):
        load(tmp_path / "d.npz")


def test_foreign_members_of_an_archive_disturb_only_under_a_wanted_name(tmp_path):
    np.savez(tmp_path / "d.npz", images=IMAGES)
    with zipfile.ZipFile(tmp_path / "d.npz", "a") as archive:
        archive.writestr("readme.txt", "hello")
        archive.writestr("folder/", "")
    assert len(load(tmp_path / "d.npz")) == 2
    with zipfile.ZipFile(tmp_path / "d.npz", "a") as archive:
        archive.writestr("labels.npy", "hello, this is no array")
    with pytest.raises(DataError, match=r"d\.npz: cannot be read: .*magic"):
        load(tmp_path / "d.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_member_packed_by_other_means_is_refused(tmp_path, method):
    file = io.BytesIO()
    np.save(file, IMAGES)
    with zipfile.ZipFile(tmp_path / "d.npz", "w", method) as archive:
        archive.writestr("images.npy", file.getvalue())
    with pytest.raises(DataError, match=r"images\.npy is compressed in a way that NumPy does not write"):
        load(tmp_path / "d.npz")


def test_header_that_unpacks_without_end_is_not_read(tmp_path, monkeypatch):
    header = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**28) + b" " * 2**28
    with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header)
    read = zipfile.ZipExtFile.read

    def bounded(self, n=-1):
        assert 0 <= n <= 2**20
        return read(self, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", bounded)
    with pytest.raises(DataError, match=r"d\.npz: cannot be read: EOF: reading array header"):
        load(tmp_path / "d.npz")


@pytest.mark.parametrize("name", ["x" * 5000 + ".npz", "a\0b.npz", "x" * 5000])
def test_name_that_no_file_can_have_is_no_data(name):
    with pytest.raises(DataError, match="no data named"):
        load(name)


# Images


def tiff_that_divides_by_zero():
    """A TIFF whose resolution, a fraction of 0 / 0, and number of rows stand in tags of wrong types."""
    tags = [(256, 3, 1, 4), (257, 3, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 5, 1, 200)]
    tags += [(277, 3, 1, 1), (278, 5, 1, 200), (279, 5, 1, 200)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return (b"II*\0" + struct.pack("<I", 8) + directory).ljust(200, b"\0") + bytes(8) + bytes(16)


@pytest.mark.parametrize("memory_limit", [4.0, 0.0], ids=["memory", "streaming"])
def test_tiff_that_raises_anything_is_one_broken_file(image_folder, memory_limit):
    path = image_folder / "a" / "9.tiff"
    path.write_bytes(tiff_that_divides_by_zero())
    with pytest.raises(Exception) as error, Image.open(path) as image:  # noqa: PT011
        image.load()
    assert not isinstance(error.value, (OSError, SyntaxError, ValueError, EOFError))
    data = load(image_folder, image_size=4, memory_limit_gb=memory_limit, workers=0)
    for batch in itertools.islice(data.batches(7, seed=0), 3):
        assert torch.equal(batch.samples.mean((1, 2, 3)), batch.labels * 2.0 - 1)
    assert list(data.broken) == [str(path)]


@pytest.mark.parametrize("error", [TypeError, KeyError, ZeroDivisionError, struct.error, IndexError, MemoryError])
@pytest.mark.parametrize("memory_limit", [4.0, 0.0], ids=["memory", "streaming"])
def test_whatever_a_plugin_raises_is_one_broken_file(image_folder, monkeypatch, error, memory_limit):
    real = Image.open

    def plugin(name, *arguments):
        if name.endswith(os.path.join("a", "1.png")):
            raise error
        return real(name, *arguments)

    monkeypatch.setattr(Image, "open", plugin)
    data = load(image_folder, image_size=4, memory_limit_gb=memory_limit, workers=0)
    list(itertools.islice(data.batches(6, seed=0), 2))
    assert data.broken == {str(image_folder / "a" / "1.png"): error.__name__}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_pipe_among_the_images_is_not_waited_for(image_folder):
    os.mkfifo(image_folder / "a" / "9.png")
    data = load(image_folder, image_size=4, workers=0)
    assert data.broken == {str(image_folder / "a" / "9.png"): "it is no file"}


@pytest.fixture
def messages(monkeypatch):
    """What is logged of a folder. Not by caplog: pytest's report of such names cannot travel between its workers."""
    start_logging()
    apart, handler, seen = logging.Logger("apart"), logging.Handler(), []
    monkeypatch.setattr(handler, "emit", lambda record: seen.append(record.getMessage()))
    for each in (*logging.getLogger("layersync_kernels").handlers, handler):
        if type(each).__module__.partition(".")[0] != "_pytest":
            apart.addHandler(each)
    monkeypatch.setattr(media, "logger", apart)
    return seen


def test_names_that_are_no_utf8_reach_log_list_and_terminal(image_folder, tmp_path_factory, messages, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=sys.__stderr__.errors)
    monkeypatch.setattr(sys, "stderr", terminal)
    name = os.fsencode(image_folder / "a") + b"/gr\xfcn\xff.png"
    with open(name, "wb") as file:
        file.write(b"no picture")
    data = load(image_folder, image_size=4, workers=0)
    assert [os.fsencode(broken) for broken in data.broken] == [name]
    assert any("1 of 7 image files are broken" in message for message in messages)
    folder = tmp_path_factory.mktemp("out")
    write_broken(folder, data.broken)
    assert (folder / BROKEN).read_bytes().split(b"\t")[0] == name
    terminal.flush()
    assert b"gr\\udcfcn\\udcff.png" in b"".join(terminal.buffer.getvalue().split())
    assert b"Traceback" not in terminal.buffer.getvalue()


def test_png_with_a_broken_checksum_inside_is_one_broken_file(image_folder):
    path = image_folder / "b" / "2.png"
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT") + 6
    content[at] ^= 0x55
    length = struct.unpack(">I", content[at - 10 : at - 6])[0]
    end = at - 2 + length
    content[end : end + 4] = struct.pack(">I", zlib.crc32(content[at - 6 : end]))  # the chunk's is right again
    path.write_bytes(content)
    data = load(image_folder, image_size=4, workers=0)
    assert list(data.broken) == [str(path)]
