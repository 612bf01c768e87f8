"""Several sizes of images in one run."""

import itertools

import pytest
import torch
from PIL import Image

from layersync_kernels.errors import ConfigError, DataError
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.data.buckets import BucketedSet, nearest_bucket
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.training.loop import Trainer

from .tiny import tiny_config

SIZES = ((8, 8), (4, 12), (12, 4))


@pytest.fixture
def folder(tmp_path):
    """Ten squares, seven wide and four tall images, each of a grey of its own."""
    (tmp_path / "a").mkdir()
    shapes = [(20, 21)] * 10 + [(10, 30)] * 7 + [(33, 10)] * 4
    for i, (height, width) in enumerate(shapes):
        Image.new("L", (width, height), 10 * i).save(tmp_path / "a" / f"{i:02d}.png")
    return tmp_path


def load(folder, **options):
    buckets = tuple(f"{height}x{width}" for height, width in SIZES)
    return load_data(DataConfig(**({"data": str(folder), "buckets": buckets, "channels": 1, "workers": 0} | options)))


def names(batch):
    return ((batch.samples.flatten(1)[:, 0] + 1) * 12.75).round().int().tolist()


def test_images_go_to_the_nearest_proportions():
    assert [nearest_bucket(h, w, SIZES) for h, w in ((5, 5), (5, 7), (5, 10), (10, 5), (100, 1))] == [0, 0, 1, 2, 2]


def test_every_batch_is_of_one_size_and_an_epoch_has_all_whole_batches(folder):
    data = load(folder)
    assert isinstance(data, BucketedSet)
    assert len(data) == 21
    batches = list(itertools.islice(data.batches(3, seed=0), 6))  # 3 + 2 + 1
    assert sorted(tuple(batch.samples.shape[2:]) for batch in batches) == sorted(
        [(8, 8)] * 3 + [(4, 12)] * 2 + [(12, 4)]
    )
    seen = [name for batch in batches for name in names(batch)]
    assert len(set(seen)) == len(seen) == 18
    for batch in batches:
        again = data.take(batch.index)
        assert torch.equal(again.samples, batch.samples)
    assert [batch.samples.shape for batch in batches] != [
        batch.samples.shape for batch in itertools.islice(data.batches(3, seed=1), 6)
    ]


def test_what_is_left_out_of_an_epoch_comes_in_another(folder):
    seen = {name for batch in itertools.islice(load(folder).batches(3, seed=0), 18) for name in names(batch)}
    assert seen == set(range(21))


@pytest.mark.parametrize("start", [3, 9, 21, 60])
def test_stream_does_not_depend_on_where_it_is_entered(folder, start):
    data = load(folder)
    whole = list(itertools.islice(data.batches(3, seed=2), 30))[start // 3 :]
    for batch, later in zip(whole, data.batches(3, seed=2, start=start), strict=False):
        assert torch.equal(batch.index, later.index)
        assert torch.equal(batch.samples, later.samples)


@pytest.mark.parametrize("kernels", ["fused", "eager"])
def test_a_run_takes_all_sizes(folder, kernels):
    config = tiny_config(model={"kernels": kernels}, optim={"batch_size": 3, "steps": 8})
    trainer = Trainer(config, load(folder))
    assert trainer.model.extent == (8, 8)
    trainer.advance(8)
    assert trainer.steps_done == 8


def test_compiled_blocks_take_all_sizes(folder):
    torch._dynamo.reset()
    trainer = Trainer(tiny_config(optim={"batch_size": 3, "steps": 8}), load(folder))
    for block in trainer.model.blocks:
        block.compile(backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        trainer.advance(8)


def test_what_cannot_be(folder):
    with pytest.raises(ConfigError, match="--buckets 8by8: expected HEIGHTxWIDTH"):
        DataConfig(buckets=("8by8",)).validate()
    with pytest.raises(ConfigError, match="leave --image-size out"):
        DataConfig(buckets=("8x8",), image_size=8).validate()
    with pytest.raises(DataError, match="no size has enough samples for a batch of 16"):
        next(load(folder).batches(16, seed=0))
    with pytest.raises(DataError, match="--memory-limit-gb"):
        load(folder, memory_limit_gb=1e-6)
    with pytest.raises(ValueError, match="of several sizes"):
        load(folder).take(torch.tensor([0, 20]))
