"""Batches, sets with lengths and splits, folders of media, and modalities in files."""

import dataclasses
import json
import math
from typing import ClassVar

import pytest
import torch

from layersync_kernels.errors import DataError
from layersync_kernels.ops.attention import length_mask
from layersync_kernels.sit.batch import Batch, Condition
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.data import registry
from layersync_kernels.sit.data.media import class_files, holds, mostly, read_all
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.modality.base import Modality, channel_statistics, cut
from layersync_kernels.sit.modality.images import Images
from layersync_kernels.sit.modality.latents import Latents
from layersync_kernels.sit.modality.registry import MODALITIES, build_modality, modality_facts
from layersync_kernels.sit.sampling.draw import conditions
from layersync_kernels.sit.spec import SampleSpec


def sequences(count=20, **options):
    """Samples (2, 9) of one to nine positions, sample i being i all over."""
    lengths = torch.arange(count) % 9 + 1
    mask = length_mask(lengths, 9)
    return MemorySet(
        spec=SampleSpec(2, (9,), variable=True),
        num_classes=2,
        class_names=["a", "b"],
        samples=torch.arange(count).float().view(-1, 1, 1) * mask[:, None].expand(-1, 2, -1),
        labels=torch.arange(count) % 2,
        lengths=lengths,
        text=torch.randn(count, 3, 4),
        text_lengths=torch.arange(count) % 3 + 1,
        **options,
    )


def test_the_index_of_a_batch_stays_on_the_host():
    """From memory that is not pinned a copy to a card waits for all that the card has to do."""
    batch = sequences().take(torch.arange(4))
    moved = dataclasses.replace(batch, mirrored=torch.ones(4, 1, 1, dtype=torch.bool)).to(torch.device("meta"))
    assert moved.index is batch.index
    assert moved.samples.is_meta
    assert moved.mirrored.is_meta
    assert moved.condition.text_lengths.is_meta


def test_batch_is_cut_and_moved_with_all_that_is_known():
    data = sequences()
    batch = next(data.batches(6, seed=0))
    part = batch.split(4)[1]
    assert len(part) == 2
    assert torch.equal(part.samples[:, 0, 0], part.index.float())
    assert torch.equal(part.condition.lengths, part.index % 9 + 1)
    assert torch.equal(part.condition.text, data.text[part.index])
    assert part.mirrored is None
    assert part.to(torch.device("meta")).condition.text.device.type == "meta"
    assert set(part.condition.keywords()) == {"y", "lengths", "text", "text_lengths"}
    assert set(Condition(part.labels).keywords()) == {"y"}


def test_conditions_are_joined():
    parts = sequences().take(torch.arange(5)).condition.split(2)
    again = Condition.cat(parts)
    assert torch.equal(again.lengths, torch.arange(5) + 1)
    assert Condition.cat([Condition(torch.arange(2))] * 2).lengths is None


def test_length_mask_counts():
    assert length_mask(torch.tensor([0, 2, 3]), 3).sum(1).tolist() == [0, 2, 3]


def test_subset_keeps_lengths_words_and_split():
    data = sequences(test=torch.arange(20) >= 15)
    part = data.subset(torch.tensor([16, 3]))
    batch = part.take(torch.tensor([0, 1]))
    assert batch.condition.lengths.tolist() == [8, 4]
    assert torch.equal(batch.condition.text, data.text[[16, 3]])
    assert part.test.tolist() == [True, False]


def test_typical_lengths_are_quantiles_of_each_class():
    data = sequences(360)
    data.lengths[data.labels == 1] = 5
    first, second = data.typical_lengths()
    assert list(first) == sorted(first)
    assert (min(first), max(first)) == (1, 9)
    assert set(second) == {5}
    drawn = conditions(torch.tensor([1, 0, 0, 1, 0]), (first, second))
    assert drawn.lengths.tolist() == [5, first[0], first[1], 5, first[2]]
    assert conditions(torch.tensor([1]), ()).lengths is None


def test_class_without_samples_takes_the_longest_length():
    assert conditions(torch.tensor([1]), ((3, 4), ())).lengths.tolist() == [4]


@pytest.mark.parametrize("published", [False, True])
def test_split_is_the_published_one_or_always_the_same_tenth(monkeypatch, published):
    test = torch.arange(20) < 7 if published else None
    kind = registry.DataKind("sequences", lambda name: name == "sequences", lambda config: sequences(test=test))
    monkeypatch.setattr(registry, "KINDS", [kind])
    train, held_out, both, again = (
        registry.load_data(DataConfig(data="sequences", split=split)) for split in ("train", "test", "all", "test")
    )
    assert len(held_out) == (7 if published else 2)
    assert sorted([*train.samples[:, 0, 0].tolist(), *held_out.samples[:, 0, 0].tolist()]) == list(range(20))
    assert torch.equal(held_out.samples, again.samples)
    assert len(both) == 20


def test_split_without_samples_stops(monkeypatch):
    whole = sequences(test=torch.zeros(20, dtype=torch.bool))
    monkeypatch.setattr(registry, "KINDS", [registry.DataKind("x", lambda name: True, lambda config: whole)])
    with pytest.raises(DataError, match="--split test: none of the 20 samples"):
        registry.load_data(DataConfig(data="x", split="test"))


# Folders


def test_classes_are_sub_folders_that_hold_such_files(tmp_path):
    for name in ("b/2.TXT", "b/deep/1.txt", "a/3.txt", "empty/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files, classes = class_files(tmp_path, {".txt"})
    assert classes == ["a", "b"]
    assert [(str(path.relative_to(tmp_path)), label) for path, label in files] == [
        ("a/3.txt", 0),
        ("b/2.TXT", 1),
        ("b/deep/1.txt", 1),
    ]
    flat, one = class_files(tmp_path / "b", {".png"}), class_files(tmp_path / "a", {".txt"})
    assert flat == ([], ["b"])
    assert one[1] == ["a"]
    assert [path.name for path, _ in one[0]] == ["3.txt"]


def test_folder_holds_a_kind_of_file_at_any_depth(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.WAV").touch()
    assert holds(str(tmp_path), {".wav"})
    assert not holds(str(tmp_path), {".mp3"})
    assert not holds("x" * 5000, {".wav"})


def test_a_folder_is_what_most_of_its_files_are(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").touch()
    (tmp_path / "stray.wav").touch()
    (tmp_path / "notes.txt").touch()
    assert not mostly(str(tmp_path), {".wav"})
    assert mostly(str(tmp_path), {".png"})
    assert not mostly(str(tmp_path / "none"), {".png"})
    assert not mostly("x" * 5000, {".png"})


def test_files_beside_class_folders_are_told(tmp_path, caplog):
    for name in ("a/1.txt", "2.txt", "3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files, classes = class_files(tmp_path, {".txt"})
    assert (len(files), classes) == (1, ["a"])
    assert "2 files beside the 1 class folders are left out" in caplog.text


def test_broken_files_are_counted_and_the_others_keep_their_order(caplog):
    def read(number):
        if number in (1, 3):
            raise ValueError("cut off")
        return number * 10

    good, broken = read_all(list("abcde"), read, what="sounds", workers=3)
    assert list(good.items()) == [(0, 0), (2, 20), (4, 40)]
    assert broken == {"b": "cut off", "d": "cut off"}
    assert "2 of 5 sounds are broken" in caplog.text
    with pytest.raises(DataError, match=r"none of the 2 sounds can be read \(b: cut off; d: cut off\)"):
        read_all(["b", "d"], lambda number: read(1), what="sounds", workers=0)


def test_settings_that_are_wrong_end_the_reading():
    def read(number):
        raise DataError("--rate 0")

    with pytest.raises(DataError, match="--rate 0"):
        read_all(["a", "b"], read, what="sounds", workers=1)


# Modalities


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scalars(Modality):
    kind: ClassVar[str] = "scalars"
    rate: float = 2.0

    def overview(self, samples, stem, *, columns, lengths=None):
        return []

    def save(self, sample, stem):
        return stem


def test_statistics_normalise_each_channel_and_come_back():
    values = [torch.randn(3, n) * torch.tensor([[1.0], [5.0], [0.0]]) + 7 for n in (50, 20)]
    mean, std = channel_statistics(values)
    modality = Scalars(mean=mean, std=std)
    whole = torch.cat(values, 1)[None]
    samples = modality.normalise(whole)
    torch.testing.assert_close(samples.mean(2), torch.zeros(1, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(samples.std(2, correction=0), torch.tensor([[1.0, 1.0, 0.0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(modality.restore(samples), whole)
    assert std[2] == 1  # constant
    assert torch.equal(Scalars().normalise(whole), whole)


@pytest.mark.parametrize("modality", [Images(), Latents(mean=(0.1, -math.pi), std=(1.0, 2.0)), Scalars(rate=3.0)])
def test_modality_is_the_same_after_json(monkeypatch, modality):
    monkeypatch.setitem(MODALITIES, "scalars", Scalars)
    assert build_modality(json.loads(json.dumps(modality_facts(modality)))) == modality


@pytest.mark.parametrize(
    "facts", [{}, {"kind": "smells"}, {"kind": 3}, {"kind": "images", "mean": "x"}, {"kind": "x" * 999}]
)
def test_unknown_modality_is_named(facts):
    with pytest.raises(ValueError, match="modality") as error:
        build_modality(facts)
    assert len(str(error.value)) < 400


def test_samples_are_cut_to_their_lengths():
    samples = torch.randn(2, 3, 5)
    assert [tuple(sample.shape) for sample in cut(samples, torch.tensor([2, 5]))] == [(3, 2), (3, 5)]
    assert [tuple(sample.shape) for sample in cut(samples, None)] == [(3, 5), (3, 5)]


def test_batch_is_as_long_as_its_samples():
    assert len(Batch(torch.zeros(3, 1, 2), Condition(torch.zeros(3)), torch.arange(3))) == 3
