"""Data for many processes: shares, resumption, latents and tars read as training goes, files behind URLs."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import logging
import os
import re
import sys
import tarfile
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from layersync_kernels.errors import ConfigError, DataError
from layersync_kernels.sit.batch import Share
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.data import remote
from layersync_kernels.sit.data.base import EpochShuffle
from layersync_kernels.sit.data.buckets import BucketedSet
from layersync_kernels.sit.data.draws import draw
from layersync_kernels.sit.data.latents_index import shard_name
from layersync_kernels.sit.data.latents_set import LatentSet, StreamedLatents
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.data.remote import ShardCache
from layersync_kernels.sit.data.shards import ShardShuffle, window_of
from layersync_kernels.sit.data.streaming import StreamingSet
from layersync_kernels.sit.data.wait import DataClock

from .tiny import tiny_data

fsspec = pytest.importorskip("fsspec")
memory_filesystem = pytest.importorskip("fsspec.implementations.memory")

COUNT, SHARD = 50, 7  # eight files, of which the last has one sample
INDEX = {
    "source": "x", "autoencoder": "", "of": "images", "samples": COUNT, "shard": SHARD, "flip": True,
    "shape": [4, 3, 2], "variable": True, "num_classes": 5, "class_names": list("abcde"),
    "shift": [0.5], "scale": [2.0], "sample_rate": 44100,
}  # fmt: skip


def write_latents(folder, **facts):
    """A folder as `layersync latents` writes it: the mean of sample i is i in all places."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").write_text(json.dumps(INDEX | facts))
    for number, own in enumerate(torch.arange(COUNT).split(SHARD)):
        mean = own.view(-1, 1, 1, 1).expand(-1, 4, 3, 2).half().contiguous()
        tensors = {"mean": mean, "mean_mirrored": -mean, "std": torch.full_like(mean, 0.1)}
        tensors |= {"std_mirrored": torch.full_like(mean, 0.2), "labels": own % 5, "lengths": 1 + own % 3}
        save_file(tensors, folder / shard_name(number))
    return folder


def change(path, **tensors):
    save_file(load_file(path) | tensors, path)


def latents(folder, **options):
    defaults = {"data": str(folder), "flip": True, "memory_limit_gb": 0, "workers": 0, "shuffle_shards": 2}
    return load_data(DataConfig(**(defaults | options)))


def png(number, size=(4, 4)):
    file = io.BytesIO()
    Image.new("L", size, number).save(file, format="PNG")
    return file.getvalue()


def write_tars(folder, mode="w"):
    folder.mkdir()
    for number, own in enumerate(torch.arange(COUNT).split(SHARD)):
        with tarfile.open(folder / f"x-{number}.tar", mode) as archive:
            for i in own.tolist():
                for name, content in ((f"{i:02}.png", png(i)), (f"{i:02}.cls", str(i % 5).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return folder


def images(folder, **options):
    return load_data(DataConfig(**({"data": str(folder), "image_size": 4, "channels": 1, "workers": 0} | options)))


def write_images(folder, size=lambda i: (4, 4)):
    (folder / "a").mkdir(parents=True)
    for i in range(COUNT):
        (folder / "a" / f"{i:02}.png").write_bytes(png(i, size(i)))
    return folder


def build(kind, tmp_path, workers=0):
    """A set of that kind, and its class."""
    if kind == "memory":
        return tiny_data()
    if kind == "buckets":
        folder = write_images(tmp_path / "i", lambda i: (4, 8) if i < 25 else (8, 4))
        data = load_data(DataConfig(data=str(folder), buckets=("8x4", "4x8"), channels=1, workers=workers))
        assert isinstance(data, BucketedSet)
    elif kind == "images":
        data = images(write_images(tmp_path / "i"), memory_limit_gb=0, workers=workers)
        assert isinstance(data, StreamingSet)
    elif kind in ("tars", "remote tars"):
        folder = write_tars(tmp_path / "t")
        name = folder if kind == "tars" else f"file://{folder}/x-{{0..7}}.tar"
        options = {"memory_limit_gb": 0, "workers": workers, "shuffle_shards": 2, "cache": tmp_path / "cache"}
        data = images(name, **options)
        assert isinstance(data, StreamingSet)
        assert list(data.files) == [7] * 7 + [1]
    else:
        folder = write_latents(tmp_path / "l")
        name = f"file://{folder}" if kind == "remote" else str(folder)
        limit = 1 if kind == "latents" else 0
        data = latents(name, cache=tmp_path / "cache", memory_limit_gb=limit, workers=workers)
        assert isinstance(data, LatentSet if kind == "latents" else StreamedLatents)
    return data


KINDS = ["memory", "buckets", "images", "tars", "remote tars", "latents", "streamed", "remote"]
STREAMED = ["images", "tars", "remote tars", "streamed", "remote"]


def tensors(batch):
    found = {"samples": batch.samples, "labels": batch.labels, "index": batch.index, "mirrored": batch.mirrored}
    return {name: value for name, value in (found | {"lengths": batch.condition.lengths}).items() if value is not None}


def assert_equal(batch, other):
    ours, theirs = tensors(batch), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def joined(parts, passes):
    """What several processes have, in the order of one: of each pass the part of each."""
    keys = tensors(parts[0])
    split = [{name: value.chunk(passes) for name, value in tensors(part).items()} for part in parts]
    return {name: torch.cat([own[name][i] for i in range(passes) for own in split]) for name in keys}


# Shares


@pytest.mark.parametrize("kind", KINDS)
def test_shares_make_up_the_batch_of_one_process(kind, tmp_path):
    data = build(kind, tmp_path)
    for start in (0, 48, 12):
        whole = list(itertools.islice(data.batches(24, seed=3, start=start), 3))
        for world, passes in itertools.product((1, 2, 3, 4), (1, 2)):
            streams = [data.batches(24, seed=3, start=start, share=Share(r, world, passes)) for r in range(world)]
            for batch, *parts in zip(whole, *streams, strict=False):
                assert {len(part) for part in parts} == {24 // world}
                for name, value in joined(parts, passes).items():
                    assert torch.equal(value, tensors(batch)[name]), (name, world, passes)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "buckets"])  # whose batches depend on their size
def test_a_sample_depends_on_its_position_alone(kind, tmp_path):
    data = build(kind, tmp_path)
    whole = tensors(next(data.batches(150, seed=1)))
    for start, size in ((0, 1), (13, 5), (49, 12), (99, 51)):
        part = tensors(next(data.batches(size, seed=1, start=start)))
        for name, value in part.items():
            assert torch.equal(value, whole[name][start : start + size]), name
    assert not torch.equal(next(data.batches(150, seed=2)).index, whole["index"])


@pytest.mark.parametrize("kind", KINDS)
def test_interruptions_and_other_numbers_of_processes_repeat_and_skip_nothing(kind, tmp_path):
    data = build(kind, tmp_path)
    undisturbed = Counter()
    for batch in itertools.islice(data.batches(12, seed=5), 20):
        undisturbed.update(batch.index.tolist())
    seen, position = Counter(), 0
    # Steps up to a checkpoint, steps that an interruption loses, processes; the last goes to the end.
    for steps, lost, world in ((3, 2, 1), (6, 0, 2), (4, 1, 4), (7, 0, 2)):
        streams = [data.batches(12, seed=5, start=position, share=Share(r, world)) for r in range(world)]
        for number, parts in enumerate(itertools.islice(zip(*streams, strict=False), steps + lost)):
            if number < steps:
                seen.update(i for part in parts for i in part.index.tolist())
                position += 12
    assert seen == undisturbed


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(kind, workers, tmp_path):
    data = build(kind, tmp_path)
    share = Share(1, 2, 2)
    alone = list(itertools.islice(data.batches(12, seed=2, start=5, share=share), 6))
    before = torch.get_rng_state()
    stream = dataclasses.replace(data, workers=workers).batches(12, seed=2, start=5, share=share)
    for batch, other in zip(alone, stream, strict=False):
        assert_equal(batch, other)
    stream.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"a batch of 10 does not divide into 2 passes of 3 processes.* multiple of 6"):
        Share(0, 3, 2).of(torch.arange(10))


def test_a_batch_may_be_larger_than_the_data(tmp_path):
    data = build("streamed", tmp_path)
    counts = Counter(next(data.batches(2 * COUNT, seed=0)).index.tolist())
    assert counts == dict.fromkeys(range(COUNT), 2)


# The order of samples in files


@pytest.mark.parametrize(("sizes", "window"), [([7] * 7 + [1], 2), ([3, 1, 4, 1, 5], 3), ([30], 2), ([5, 5], 9)])
def test_every_epoch_is_a_permutation_window_by_window(sizes, window):
    count = sum(sizes)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    shuffle = ShardShuffle(sizes, window, seed=4)
    epochs = [shuffle.indices(epoch * count, count) for epoch in range(3)]

    def is_window(epoch, place, end):
        files = owner[epoch[place:end]].unique().tolist()
        whole = end - place == sum(sizes[i] for i in files)
        return whole and (len(files) == window or (end == count and len(files) < window))

    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(count))
        place = 0
        while place < count:
            ends = [end for end in range(place + 1, count + 1) if is_window(epoch, place, end)]
            assert ends
            place = ends[0]
    assert not torch.equal(epochs[0], epochs[1])
    whole = torch.cat(epochs)
    for start in range(0, 2 * count, 3):
        assert torch.equal(ShardShuffle(sizes, window, seed=4).indices(start, count), whole[start : start + count])
    assert EpochShuffle.indices is ShardShuffle.indices


def test_a_window_has_some_ten_thousand_samples():
    assert window_of([1000] * 1281 + [167], None) == 11
    assert window_of([50_000] * 20, None) == 2
    assert window_of([50_000] * 20, 5) == 5


# What is drawn


def test_draws_are_normal_numbers_and_fair_coins():
    coins, normal = draw(0, torch.arange(500), (3, 67))
    values = normal.double()
    assert values.shape == (500, 3, 67)
    count = values.numel()
    assert abs(values.mean()) < 4 / count**0.5
    assert abs(values.square().mean() - 1) < 4 * (2 / count) ** 0.5
    assert abs(values.pow(4).mean() - 3) < 4 * (96 / count) ** 0.5
    for shift in (1, 4, 201):  # of neighbours, within and between samples
        assert abs((values.flatten()[shift:] * values.flatten()[:-shift]).mean()) < 4 / count**0.5
    assert abs(coins.double().mean() - 0.5) < 4 * 0.5 / 500**0.5
    assert abs((coins.double() - 0.5) @ values[:, 0, 0]) < 4 * 0.5 * 500**0.5
    assert not torch.equal(draw(1, torch.arange(500), (3, 67))[1], normal)
    few, far = draw(0, torch.tensor([2**62, 3]), (3, 67))
    assert torch.equal(far[1], normal[3])
    assert few[1] == coins[3]
    assert torch.equal(draw(0, torch.arange(500), (0,))[0], coins)


def test_each_pass_over_latents_draws_anew(tmp_path):
    data = build("streamed", tmp_path)
    first, second = itertools.islice(data.batches(COUNT, seed=0), 2)
    order, again = first.index.argsort(), second.index.argsort()
    same = (first.mirrored[order] == second.mirrored[again]).flatten()
    assert 0 < same.sum() < COUNT
    assert not torch.equal(first.samples[order][same], second.samples[again][same])
    for i, length, sample, mirrored in zip(
        first.index.tolist(), first.condition.lengths.tolist(), first.samples, first.mirrored, strict=True
    ):
        drawn = sample[:, :length] / 2.0 + 0.5  # of shift and scale
        assert (drawn - (-i if mirrored else i)).abs().max() < 5 * (0.2 if mirrored else 0.1) + 0.02
        assert not sample[:, length:].any()


@pytest.mark.parametrize("kind", ["streamed", "remote"])
@pytest.mark.parametrize("options", [{}, {"flip": False}, {"latent_sample": "mean"}])
def test_latents_that_are_streamed_are_those_in_memory(kind, options, tmp_path):
    folder = write_latents(tmp_path / "l")
    name = f"file://{folder}" if kind == "remote" else folder
    streamed = latents(name, cache=tmp_path / "cache", shuffle_shards=9, **options)
    held = latents(folder, memory_limit_gb=1, **options)
    positions, numbers = torch.arange(7, 37), torch.randperm(COUNT)[:30]
    assert_equal(streamed.drawn(positions, numbers, 3), held.drawn(positions, numbers, 3))
    assert_equal(streamed.take(numbers), held.take(numbers))
    assert (streamed.spec, streamed.modality, len(streamed)) == (held.spec, held.modality, len(held))


# What is open, and what is cached


def mapped(folder):
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split("/", 1)[1].removesuffix(" (deleted)") for line in lines if str(folder) in line}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["streamed", "remote"])
def test_few_files_are_open_and_few_bytes_cached(kind, tmp_path):
    data = build(kind, tmp_path)
    size = (tmp_path / "l" / shard_name(0)).stat().st_size
    data.files.cache.limit = 3 * size
    opened = set()
    for batch in itertools.islice(data.batches(5, seed=0), 30):
        assert len(batch) == 5
        assert data.files.opened <= 4
        assert len(mapped(tmp_path)) <= 4
        opened |= mapped(tmp_path)
        copies = [path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors")]
        assert sum(copies) <= 3 * size
    assert len({name.rpartition("latents_")[2] for name in opened}) == 8


def test_the_copy_that_was_used_longest_ago_goes_first(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_bytes(bytes(10))
    cache = ShardCache(tmp_path / "cache", 25)

    def use(name):
        assert cache.open(f"file://{tmp_path / name}", Path.read_bytes) == bytes(10)
        return {path.name[-1] for path in cache.folder.iterdir() if path.suffix != ".lock"}

    assert [use(name) for name in "abacdb"] == [{"a"}, {"a", "b"}, {"a", "b"}, {"a", "c"}, {"c", "d"}, {"d", "b"}]
    (tmp_path / "a").write_bytes(bytes(26))
    with pytest.raises(DataError, match="more than --cache-limit-gb"):
        cache.open(f"file://{tmp_path / 'a'}", Path.read_bytes)


def test_a_copy_left_half_by_a_process_that_died_makes_room_and_what_is_no_copy_stays(tmp_path):
    (tmp_path / "a").write_bytes(bytes(10))
    cache = ShardCache(tmp_path / "cache", 25)
    cache.folder.mkdir()
    (cache.folder / f".writing-1-{16 * '0'}-b").write_bytes(bytes(20))
    (cache.folder / "thesis.txt").write_bytes(bytes(100))
    cache.open(f"file://{tmp_path / 'a'}", Path.read_bytes)
    assert not list(cache.folder.glob(".writing*"))
    assert (cache.folder / "thesis.txt").is_file()


class Flaky(memory_filesystem.MemoryFileSystem):
    """Fails as often as it is told to, gives less than there is, and counts what is opened."""

    protocol = "flaky"
    cachable = False
    failures = 0
    short = False
    opened: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return f"/{path.removeprefix('flaky://').strip('/')}"

    def _fail(self):
        if Flaky.failures:
            Flaky.failures -= 1
            raise TimeoutError("the network is slow")

    def cat_file(self, path, **options):
        self._fail()
        return super().cat_file(path, **options)

    def _open(self, path, mode="rb", **options):
        if "r" in mode:
            self._fail()
            Flaky.opened.append(path)
        file = super()._open(path, mode, **options)
        return io.BytesIO(file.read()[:-1]) if Flaky.short and "r" in mode else file


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    """The URL of a folder of latents behind a file system that can fail."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(remote, "PAUSE", 0)
    monkeypatch.setattr(Flaky, "store", {})
    monkeypatch.setattr(Flaky, "pseudo_dirs", [""])
    monkeypatch.setattr(Flaky, "failures", 0)
    monkeypatch.setattr(Flaky, "opened", [])
    files = Flaky()
    for path in write_latents(tmp_path / "l").iterdir():
        files.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    return "flaky://bucket"


def test_what_fails_once_is_tried_again(flaky, tmp_path, monkeypatch, caplog):
    Flaky.failures = 1
    with caplog.at_level(logging.WARNING):
        data = latents(flaky, cache=tmp_path / "cache")
        assert "bucket/index.json: the network is slow; trying once more" in caplog.text
        Flaky.failures = 1
        next(data.batches(12, seed=0))
    assert caplog.text.count("trying once more") == 2
    data = latents(flaky, cache=tmp_path / "other")
    Flaky.failures = 2
    with pytest.raises(DataError, match=r"cannot fetch flaky://bucket/latents_.*tried twice: the network is slow"):
        next(data.batches(12, seed=0))
    Flaky.failures = 2
    with pytest.raises(DataError, match=r"cannot fetch flaky://bucket/index.json, tried twice"):
        latents(flaky)
    monkeypatch.setattr(Flaky, "short", True)
    with pytest.raises(DataError, match=r"tried twice: \d+ bytes came; expected \d+"):
        next(data.batches(12, seed=0))
    assert not list((tmp_path / "other").glob("*.safetensors"))


def test_processes_that_want_the_same_file_fetch_it_once(flaky, tmp_path):
    url = f"{flaky}/{shard_name(0)}"
    results = []

    def fetch():  # locks are between open files, so that threads stand for processes
        results.append(len(ShardCache(tmp_path / "cache", 2**20).open(url, Path.read_bytes)))

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(tmp_path / "l" / shard_name(0)).stat().st_size] * 6
    assert len(Flaky.opened) == 1


def test_a_file_that_changed_behind_its_url_is_fetched_anew(flaky, tmp_path):
    url = f"{flaky}/index.json"
    cache = ShardCache(tmp_path / "cache", 2**20)
    assert json.loads(cache.open(url, Path.read_bytes)) == INDEX
    Flaky().pipe_file("/bucket/index.json", b"[]")
    assert cache.open(url, Path.read_bytes) == b"[]"


def test_what_is_not_there_is_said_at_once(flaky, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"there is no flaky://nowhere/index.json"):
        latents("flaky://nowhere")
    with pytest.raises(DataError, match=r"cannot open nobody://x/index.json: .*nobody"):
        latents("nobody://x")
    with pytest.raises(DataError, match=r"there is no flaky://x/y.tar"):
        images("flaky://x/y.tar", cache=tmp_path / "cache")
    Flaky().rm_file(f"/bucket/{shard_name(7)}")
    with pytest.raises(DataError, match=r"there is no flaky://bucket/latents_00007"):
        list(itertools.islice(latents(flaky, cache=tmp_path / "cache").batches(10, seed=0), 5))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for load, name in ((latents, "s3://bucket/latents"), (images, "s3://bucket/x-{0..7}.tar")):
        with pytest.raises(DataError, match=r"cannot open s3://bucket/.*: Install s3fs to access S3"):
            load(name)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"--data flaky://bucket/index.json needs .*layersync_kernels\[remote\]"):
        latents(flaky)
    with pytest.raises(ConfigError, match=r"--data flaky://bucket/x.tar needs .*layersync_kernels\[remote\]"):
        images("flaky://bucket/x.tar")


# Damage


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cannot read .*latents_00003"),
        (lambda path: path.write_bytes(b""), "cannot read .*latents_00003"),
        (
            lambda path: change(path, mean=torch.zeros(7, 4, 3, 3).half()),
            r"00003.*\(7, 4, 3, 3\).*\(7, 4, 3, 2\)",
        ),
        (
            lambda path: change(path, std=torch.zeros(6, 4, 3, 2).half()),
            "00003.*std is .*do not fit index.json",
        ),
        (lambda path: change(path, mean=torch.zeros(7, 4, 3, 2)), "latents_00003.*mean is .*float32.*float16"),
        (lambda path: change(path, labels=torch.full((7,), 5)), "latents_00003.*not those of 5 classes.*from 5 to 5"),
        (
            lambda path: change(path, lengths=torch.full((7,), 4)),
            "00003.*lengths go from 4 to 4; expected 1 to 3",
        ),
        (lambda path: path.with_name("index.json").write_text(json.dumps(INDEX | {"shape": [4, 2, 3]})), "do not fit"),
        (lambda path: path.with_name("index.json").write_text(json.dumps(INDEX | {"shard": 6})), "lacks 1 of 9 files"),
        (lambda path: path.with_name("index.json").write_text("{"), "cannot read .*index.json"),
    ],
)
@pytest.mark.parametrize("limit", [0, 1])
def test_damaged_files_are_named_before_training(spoil, match, limit, tmp_path):
    folder = write_latents(tmp_path / "l")
    spoil(folder / shard_name(3))
    with pytest.raises(DataError, match=match):
        latents(folder, memory_limit_gb=limit)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_breaks_while_training_goes_is_named(workers, tmp_path):
    data = build("streamed", tmp_path, workers)
    path = tmp_path / "l" / shard_name(5)
    content = load_file(path)["mean"]
    content[:, 1] = torch.inf
    change(path, mean=content)
    data.files._open.clear()
    with pytest.raises(DataError, match=r"^\S*latents_00005.safetensors holds NaN or infinity"):
        list(itertools.islice(data.batches(10, seed=0), 5))
    path.unlink()
    with pytest.raises(DataError, match=r"^cannot read \S*latents_00005.safetensors: .*is it still there"):
        list(itertools.islice(data.batches(10, seed=0), 5))


def test_a_damaged_copy_is_fetched_anew(tmp_path):
    data = build("remote", tmp_path)
    path = tmp_path / "l" / shard_name(2)
    good = path.read_bytes()
    path.write_bytes(bytes(len(good)))
    with pytest.raises(DataError, match=r"cannot read file://.*latents_00002"):
        data.take(torch.tensor([2 * SHARD]))
    assert not list((tmp_path / "cache").glob("*00002.safetensors"))


def test_a_worker_that_dies_is_an_error_that_says_so(tmp_path, monkeypatch):
    data = build("streamed", tmp_path, workers=1)
    monkeypatch.setattr(StreamedLatents, "rows", lambda *_: os._exit(9))
    with pytest.raises(DataError, match="a process that reads the data has died"):
        next(data.batches(10, seed=0))


def test_settings_that_cannot_be():
    for option, match in (
        ({"prefetch": 0}, "--prefetch 0: expected at least 1"),
        ({"shuffle_shards": 0}, "--shuffle-shards 0: expected at least 1"),
        ({"cache_limit_gb": 0}, "--cache-limit-gb 0: expected a positive number"),
    ):
        with pytest.raises(ConfigError, match=re.escape(match)):
            DataConfig(**option).validate()


# Tar files


def test_tars_beyond_the_limit_are_read_from_their_places(tmp_path):
    folder = write_tars(tmp_path / "t")
    held, streamed = images(folder), images(folder, memory_limit_gb=0, shuffle_shards=2)
    index = torch.randperm(COUNT)
    assert_equal(streamed.take(index), held.take(index))
    owners = next(streamed.batches(COUNT, seed=0)).index // SHARD
    assert len(owners[:8].unique()) <= 2  # a window of two files has at least as many samples
    streamed = images(folder, memory_limit_gb=0, shuffle_shards=2)  # of whose files none is open yet
    (folder / "x-3.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read .*x-3.tar.*is it still there"):
        list(itertools.islice(streamed.batches(10, seed=0), 5))
    (folder / "x-3.tar").write_bytes(bytes(600))
    with pytest.raises(DataError, match=r"x-3.tar ends before byte"):
        streamed.take(torch.arange(21, 28))


def opened(folder):
    """Files of that folder that this process has open, deleted ones too."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return {name for name in links if name.startswith(f"{folder}/") and ".tar" in name}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["tars", "remote tars"])
def test_few_tars_are_open_and_few_bytes_cached(kind, tmp_path):
    folder = write_tars(tmp_path / "t")
    size = (folder / "x-0.tar").stat().st_size
    name = folder if kind == "tars" else f"file://{folder}/x-{{0..7}}.tar"
    options = {"memory_limit_gb": 0, "shuffle_shards": 2, "cache_limit_gb": 3 * size / 2**30}
    data = images(name, cache=tmp_path / "cache", **options)
    seen, held = set(), images(folder)
    for batch in itertools.islice(data.batches(5, seed=0), 30):
        assert_equal(batch, held.take(batch.index))
        assert len(opened(tmp_path)) <= 4
        seen |= opened(tmp_path)
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 3 * size
    assert len({re.search(r"x-(\d)\.tar", name)[1] for name in seen}) == 8


def test_tars_behind_urls_are_fetched_by_the_cache_and_held_within_the_limit(flaky, tmp_path, caplog):
    for path in write_tars(tmp_path / "t").iterdir():
        Flaky().pipe_file(f"/bucket/{path.name}", path.read_bytes())
    name, index = f"{flaky}/x-{{0..7}}.tar", torch.randperm(COUNT)
    expected = images(tmp_path / "t").take(index)
    Flaky.failures = 1
    streamed = images(name, cache=tmp_path / "cache", memory_limit_gb=0)
    assert caplog.text.count("trying once more") == 1
    assert_equal(streamed.take(index), expected)
    held = images(name, cache=tmp_path / "cache")
    assert len(Flaky.opened) == 8  # each file once, for there is room
    for path in (tmp_path / "cache").glob("[0-9a-f]*-*.tar"):
        path.unlink()
    again = images(name, cache=tmp_path / "cache", memory_limit_gb=0)
    assert (len(again), again.class_names, len(Flaky.opened)) == (COUNT, list("01234"), 8)  # what is in them is noted
    assert_equal(again.take(index), expected)
    assert len(Flaky.opened) == 16
    Flaky.failures = 9
    assert_equal(held.take(index), expected)
    Flaky.failures = 0
    Flaky().pipe_file("/bucket/x-0.tar", b"x" * 1024)
    with pytest.raises(DataError, match=r"cannot read flaky://bucket/x-0.tar"):
        images(name, cache=tmp_path / "cache")
    Flaky().rm_file("/bucket/x-5.tar")
    with pytest.raises(DataError, match=r"there is no flaky://bucket/x-5.tar"):
        images(f"{flaky}/x-{{5..6}}.tar", cache=tmp_path / "cache")


def test_compressed_tars_are_held_or_refused(tmp_path):
    folder = write_tars(tmp_path / "t", "w:gz")
    assert len(images(folder)) == COUNT
    with pytest.raises(DataError, match=r"x-0.tar is compressed, and more than --memory-limit-gb"):
        images(folder, memory_limit_gb=0)


# Waiting


def test_the_wait_for_data_is_counted():
    now = itertools.accumulate([0, 2, 10, 3, 100, 5, 7, 1])  # odd steps pass within `next`
    clock = DataClock("abc", lambda: float(next(now)))
    assert [next(clock), next(clock)] == ["a", "b"]
    assert clock.seconds == 5
    assert clock.lap() == 5
    assert next(clock) == "c"
    assert clock.seconds == 5
    with pytest.raises(StopIteration):
        next(clock)
    assert clock.seconds == 6
