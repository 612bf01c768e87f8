"""Sizes that data files declare, true or not."""

from __future__ import annotations

import gzip
import io
import itertools
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch

from layersync_kernels.errors import DataError
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.data import arrays, pixels
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.data.streaming import StreamingSet


def hostile_npz(path, **members):
    """An archive of arrays whose headers say (descr, shape, Fortran order) and whose content is 16 bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, (descr, shape, fortran) in members.items():
            file = io.BytesIO()
            np.lib.format.write_array_header_1_0(file, {"descr": descr, "shape": shape, "fortran_order": fortran})
            archive.writestr(f"{name}.npy", file.getvalue() + bytes(16))
    return path


HUGE = (10**7, 64, 64, 3)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"images": ("|u1", HUGE, False)}, r"images\.npy declares uint8 \(10000000, 64, 64, 3\): 114 GB .*-gb 4\b"),
        ({"images": ("|u1", HUGE, True)}, "114 GB"),
        ({"images": ("<f8", HUGE, False)}, "916 GB"),
        ({"latents": ("<f2", (10**8, 4, 32, 32), False)}, "763 GB"),
        ({"images": ("|u1", (2**40, 2**40, 2**40), False)}, "GB"),  # the number of bytes is beyond 64 bits
        ({"images": ("|u1", (1, 4, 4), False), "labels": ("<i8", (10**12,), False)}, "labels.npy declares int64"),
        ({"images": ("|u1", (10, 4, 4), False)}, "160 bytes, and holds 16"),
        ({"images": ("|u1", (-1, 4, 4), False)}, r"\(-1, 4, 4\), which cannot be"),
        ({"images": ("|O", (1, 4, 4), False)}, "Python objects"),
        ({"labels": ("|u1", HUGE, False), "images": ("|u1", (1, 4, 4), False)}, "114 GB"),
    ],
)
def test_npz_that_declares_what_is_not_there_is_refused_by_its_header(tmp_path, members, message):
    path = hostile_npz(tmp_path / "bad.npz", **members)
    with pytest.raises(DataError, match=rf"bad\.npz: .*{message}"):
        load_data(DataConfig(data=str(path)))


def test_npz_may_declare_anything_under_other_names(tmp_path):
    path = hostile_npz(tmp_path / "d.npz", images=("|u1", (1, 4, 4), False), other=("|u1", HUGE, False))
    assert len(load_data(DataConfig(data=str(path)))) == 1


def test_every_damaged_npz_is_a_data_error(tmp_path):
    path = tmp_path / "d.npz"
    np.savez_compressed(path, images=np.arange(160, dtype=np.uint8).reshape(10, 4, 4), labels=np.arange(10))
    whole, told = path.read_bytes(), []
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x11]) + whole[position + 1 :])
        try:
            load_data(DataConfig(data=str(path)))
        except DataError as error:
            told.append(str(error))
    assert len(told) > len(whole) // 2
    assert all("d.npz: " in message for message in told)


def save_latents(path, tensors):
    from safetensors.torch import save_file

    save_file(tensors, path)


@pytest.mark.parametrize("kind", ["images", "floats", "latents", "safetensors", "mnist", "enlarged"])
def test_data_beyond_the_limit_say_what_to_do(tmp_path, kind):
    path, options = tmp_path / "d.npz", {}
    if kind == "safetensors":
        path = tmp_path / "d.safetensors"
        save_latents(path, {"latents": torch.zeros(64, 4, 16, 16)})
    elif kind == "mnist":
        path = "mnist"
    elif kind == "enlarged":
        np.savez(path, np.zeros((4, 4, 4), np.uint8))
        options = {"image_size": 1024}
    else:
        dtype = np.uint8 if kind == "images" else np.float32
        np.savez(path, **{"latents" if kind == "latents" else "x": np.zeros((256, 3, 16, 16), dtype)})
    load_data(DataConfig(data=str(path), **options))
    with pytest.raises(DataError, match=r"GB in memory, more than --memory-limit-gb 0.0001; raise"):
        load_data(DataConfig(data=str(path), memory_limit_gb=1e-4, **options))


def test_a_label_cannot_declare_more_classes_than_fit(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, 10**12]))
    with pytest.raises(DataError, match=r"d\.npz: labels go up to 1000000000000"):
        load_data(DataConfig(data=str(tmp_path / "d.npz")))


def test_safetensors_whose_header_lies_is_refused(tmp_path):
    header = b'{"latents":{"dtype":"F32","shape":[10000000,4,64,64],"data_offsets":[0,655360000000]}}'
    (tmp_path / "l.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(DataError, match=r"l\.safetensors: cannot be read"):
        load_data(DataConfig(data=str(tmp_path / "l.safetensors")))


def test_safetensors_is_read_by_name(tmp_path):
    path = tmp_path / "l.safetensors"
    save_latents(path, {"latents": torch.zeros(2, 4, 8, 8), "other": torch.zeros(100_000)})
    load_data(DataConfig(data=str(path), memory_limit_gb=1e-4))


def test_digits_that_unpack_to_more_than_they_declare_are_refused(tmp_path, monkeypatch):
    packed = gzip.compress(b"0," * 10**6)
    (tmp_path / "mnist.csv.gz").write_bytes(packed[:-4] + struct.pack("<I", 1000))
    monkeypatch.setattr(arrays, "find_mnist", lambda: tmp_path / "mnist.csv.gz")
    with pytest.raises(DataError, match=r"mnist\.csv\.gz"):
        load_data(DataConfig())


@pytest.mark.parametrize("streamed", [False, True])
def test_an_image_file_that_declares_too_much_is_skipped(image_folder, caplog, streamed):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(9001 * 9000))
    (image_folder / "a" / "1.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )
    limit = 1e-5 if streamed else 0.1
    size = 64 if streamed else 4
    data = load_data(DataConfig(data=str(image_folder), image_size=size, memory_limit_gb=limit, workers=0))
    assert isinstance(data, StreamingSet) == streamed
    for batch in itertools.islice(data.batches(4, seed=0), 3):
        assert torch.equal(batch.samples.mean((1, 2, 3)), batch.labels * 2.0 - 1)
    assert list(data.broken) == [str(image_folder / "a" / "1.png")]
    assert "9000x9000" in caplog.text
    assert "--memory-limit-gb" in caplog.text


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_float_images_become_the_same_pixels_in_pieces(tmp_path, monkeypatch, layout):
    shape = (5, 3, 6, 6) if layout == "NCHW" else (5, 6, 6, 3)
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    np.savez(tmp_path / "d.npz", np.asfortranarray(images))
    expected = np.rint((images + 1) / 2 * 255).astype(np.uint8)
    monkeypatch.setattr(pixels, "CHUNK_VALUES", 250)  # two images at a time
    found = load_data(DataConfig(data=str(tmp_path / "d.npz"))).samples.numpy()
    assert np.array_equal(found, expected if layout == "NCHW" else expected.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("size", [(4, 4), (5, 5), (4, 5), (3, 7)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_resized_in_pieces_are_those_resized_at_once(monkeypatch, size, channels):
    images = torch.randint(0, 256, (5, channels, 8, 10), dtype=torch.uint8)
    for layout in (images, images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        whole = pixels.resize_pixels(layout, size)
        monkeypatch.setattr(pixels, "CHUNK_VALUES", 1)
        assert torch.equal(pixels.resize_pixels(layout, size), whole)
        monkeypatch.undo()
