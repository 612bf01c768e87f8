"""`layersync sample` for any number of samples, several averages, lengths and captions."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from layersync_kernels.errors import CheckpointError, ConfigError
from layersync_kernels.sit.commands.sample import SampleCommand, sample
from layersync_kernels.sit.commands.train import run_training
from layersync_kernels.sit.config.sampling import SamplingConfig
from layersync_kernels.sit.data import registry
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.modality.base import Modality
from layersync_kernels.sit.modality.latents import Latents
from layersync_kernels.sit.models.flops import forward_flops
from layersync_kernels.sit.models.sit import SiT
from layersync_kernels.sit.sampling import many
from layersync_kernels.sit.spec import SampleSpec
from layersync_kernels.sit.text.registry import load_text_encoder
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.runlog import read_records

from .tiny import tiny_config, tiny_data

FAST = SamplingConfig(solver="euler", sampling_steps=2)
CAPTIONS = ("a man walks", "somebody jumps up and down")


def sequences(config=None, scale=1.0):
    """Eight samples of one dimension with lengths and captions."""
    text, text_lengths = load_text_encoder("hashed").encode([CAPTIONS[i % 2] for i in range(8)])
    lengths = torch.arange(8) % 4 + 3
    return MemorySet(
        spec=SampleSpec(3, (6,), variable=True),
        num_classes=1,
        class_names=["all"],
        modality=Latents(mean=(0.5, 0.0, 0.0), std=(scale, 1.0, 1.0)),
        samples=torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(0)),
        labels=torch.zeros(8, dtype=torch.long),
        lengths=lengths,
        text=text,
        text_lengths=text_lengths,
        captions=CAPTIONS,
        text_encoder="hashed",
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on images with two averages."""
    path = tmp_path_factory.mktemp("images") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "KINDS", [registry.DataKind("any", lambda name: True, lambda config: tiny_data())])
        run_training(tiny_config(optim={"ema_decay": (0.9, 0.5), "steps": 4}), path)
    return path


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A run on sequences with captions."""
    path = tmp_path_factory.mktemp("words") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "KINDS", [registry.DataKind("any", lambda name: True, sequences)])
        model = {"patch_size": (2,), "class_dropout": 0.3}
        log = {"sample_every": 4, "grid_classes": 3}
        config = tiny_config(data={"flip": False}, model=model, optim={"steps": 4}, log=log)
        run_training(config, path)
    return path


def command(run, folder, **changes):
    options = {"sampling": FAST, "precision": "fp32", "device": "cpu", "out": folder, "number": 7, "shard": 3}
    return SampleCommand(run, **(options | changes))


def shards(folder):
    return {path.name: dict(np.load(path)) for path in sorted(folder.glob("*.npz"))}


def test_images_come_in_the_layout_of_adm(run, tmp_path):
    assert sample(command(run, tmp_path / "x")) == tmp_path / "x"
    files = shards(tmp_path / "x")
    assert list(files) == ["samples_00000.npz", "samples_00001.npz", "samples_00002.npz"]
    images = np.concatenate([file["arr_0"] for file in files.values()])
    assert (images.dtype, images.shape) == (np.uint8, (7, 4, 4, 1))
    assert np.concatenate([file["arr_1"] for file in files.values()]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert len(np.unique(images.reshape(7, -1), axis=0)) == 7


def test_a_call_that_was_stopped_goes_on(run, tmp_path, monkeypatch):
    sample(command(run, tmp_path / "whole"))
    draw, calls = many.draw, []

    def stopped(*arguments, **options):
        calls.append(options["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(many, "draw", stopped)
        with pytest.raises(KeyboardInterrupt):
            sample(command(run, tmp_path / "parts"))
    assert list(shards(tmp_path / "parts")) == ["samples_00000.npz"]
    before = (tmp_path / "parts" / "samples_00000.npz").stat().st_mtime_ns
    sample(command(run, tmp_path / "parts", batch_size=2))
    assert (tmp_path / "parts" / "samples_00000.npz").stat().st_mtime_ns == before
    whole, parts = shards(tmp_path / "whole"), shards(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, file in whole.items():
        assert all(np.array_equal(file[key], parts[name][key]) for key in file)


@pytest.mark.parametrize("change", [{"seed": 1}, {"shard": 4}, {"number": 8}, {"weights": "model"}, {"classes": (1,)}])
def test_samples_of_other_settings_are_not_mixed(run, tmp_path, change):
    sample(command(run, tmp_path / "x"))
    with pytest.raises(ConfigError, match="other settings or weights; choose another --out"):
        sample(command(run, tmp_path / "x", **change))


def test_each_sample_can_have_a_file(run, tmp_path):
    sample(command(run, tmp_path / "x", files=True, number=4))
    pictures = sorted((tmp_path / "x" / "files").iterdir())
    assert [path.name for path in pictures] == [f"{i:06d}.png" for i in range(4)]
    stored = np.concatenate([file["arr_0"] for file in shards(tmp_path / "x").values()])
    assert np.array_equal(np.array(Image.open(pictures[3])), stored[3, ..., 0])


@pytest.mark.parametrize("change", [{"number": 0}, {"shard": 0}, {"per_class": 0}, {"seed": -1}, {"classes": (3,)}])
def test_nonsense_is_refused(run, tmp_path, change):
    with pytest.raises(ConfigError, match=f"--{next(iter(change)).replace('_', '-')}"):
        sample(command(run, tmp_path / "x", **change))


# Several averages


def test_each_average_is_kept_and_drawn_from(run, tmp_path):
    folder = run / "checkpoints" / "step_00000004"
    first, second, model = (load_file(folder / f"{stem}.safetensors") for stem in ("ema", "ema-0.5", "model"))
    name = "final_layer.linear.weight"
    assert not torch.equal(first[name], second[name])
    assert not torch.equal(second[name], model[name])
    images = [
        np.concatenate([f["arr_0"] for f in shards(sample(command(run, tmp_path / which, weights=which))).values()])
        for which in ("ema", "ema-0.5", "model")
    ]
    assert not any(np.array_equal(images[i], images[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    with pytest.raises(CheckpointError, match=r"no weights 'ema-0.7'; it has: model, ema, ema-0.5"):
        sample(command(run, tmp_path / "x", weights="ema-0.7"))


def test_the_first_average_does_not_depend_on_the_others():
    states = []
    for decay in (0.9, (0.9, 0.5, 0.1)):
        trainer = Trainer(tiny_config(optim={"ema_decay": decay}), tiny_data())
        trainer.advance(3)
        states.append(trainer.ema.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("decay", [0.9, (0.9, 0.4), (0.9, 0.5, 0.4)])
def test_a_run_goes_on_with_its_averages(run, decay):
    config = tiny_config(optim={"ema_decay": decay, "steps": 6})
    with pytest.raises(CheckpointError, match=r"has the averages ema, ema-0.5; .*resume with the decays of the run"):
        Trainer(config, tiny_data()).load(run / "checkpoints" / "step_00000004")
    own = Trainer(tiny_config(optim={"ema_decay": (0.9, 0.5), "steps": 6}), tiny_data())
    own.load(run / "checkpoints" / "step_00000004")
    loaded = load_file(run / "checkpoints" / "step_00000004" / "ema-0.5.safetensors")
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in own.state.emas["ema-0.5"].state_dict().items())


# Lengths and captions


def test_samples_have_typical_lengths_and_the_captions_of_the_run(worded, tmp_path):
    sample(command(worded, tmp_path / "x", number=8, shard=8))
    (file,) = shards(tmp_path / "x").values()
    assert set(file["lengths"].tolist()) <= {3, 4, 5, 6}
    assert len(set(file["lengths"].tolist())) > 1
    assert file["samples"].shape == (8, 3, 6)
    assert list((worded / "samples").glob("*.png"))
    one = sample(command(worded, tmp_path / "one", captions=("a man walks",), number=2))
    assert one.is_dir()


def test_captions_belong_to_models_with_texts(run, worded, tmp_path):
    with pytest.raises(ConfigError, match="--captions: the model was not trained with texts"):
        sample(command(run, tmp_path / "x", captions=("a dog",)))
    with pytest.raises(ConfigError, match="--classes: the model was trained with texts"):
        sample(command(worded, tmp_path / "x", classes=(0,)))


def test_a_run_goes_on_with_the_normalisation_of_its_data(worded):
    config = tiny_config(data={"flip": False}, model={"patch_size": (2,), "class_dropout": 0.3}, optim={"steps": 9})
    checkpoint = worded / "checkpoints" / "step_00000004"
    Trainer(config, sequences()).load(checkpoint)
    with pytest.raises(CheckpointError, match="another normalisation"):
        Trainer(config, sequences(scale=2.0)).load(checkpoint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sounds(Modality):
    """Without mirror images."""

    kind: ClassVar[str] = "sounds"

    def overview(self, samples, stem, *, columns, lengths=None):
        return []

    def save(self, sample, stem):
        return stem


def test_flip_is_for_what_has_a_mirror_image():
    data = dataclasses.replace(sequences(), modality=Sounds())
    with pytest.raises(ConfigError, match="--flip: unused holds sounds, which has no mirror image"):
        Trainer(tiny_config(model={"patch_size": (2,)}), data)


# Throughput


def test_tokens_are_those_that_are_there(worded):
    record = read_records(worded)[-1]
    ratio = record["tokens_per_second"] / record["samples_per_second"]
    assert 2 <= ratio <= 3  # lengths 3 to 6 in patches of 2
    assert "mfu" not in record


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_size": 8}, 0),
        ({"input_size": (12,), "patch_size": 3, "positions": "rope"}, 0),
        ({"input_size": (4, 4, 6), "condition": "none"}, 0),
        ({"input_size": (12,), "condition": "cross", "text_width": 6}, 5),
        ({"input_size": (12,), "condition": "embedding", "text_width": 6}, 5),
    ],
)
def test_flops_are_those_that_pytorch_counts(options, words):
    from torch.utils.flop_counter import FlopCounterMode

    model = SiT(in_channels=3, hidden_size=24, depth=3, num_heads=2, num_classes=5, kernels="eager", **options).eval()
    given = {"y": torch.zeros(2, dtype=torch.long)}
    if words:
        given = {"text": torch.randn(2, words, 6)}
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randn(2, *model.spec.shape), torch.rand(2), **given)
    assert 2 * forward_flops(model, words=words) == counter.get_total_flops()
