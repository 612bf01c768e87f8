"""Teachers of films, sounds and anything: tokens on the model's grid, and the loss that learns from them."""

import dataclasses
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layersync_kernels import cli
from layersync_kernels.errors import ConfigError, TeacherError
from layersync_kernels.ops.attention import length_mask
from layersync_kernels.sit.config.loss import AlignConfig
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.modality.audio import Waveform
from layersync_kernels.sit.modality.images import Images
from layersync_kernels.sit.modality.motion import Motion
from layersync_kernels.sit.modality.video import Video
from layersync_kernels.sit.spec import SampleSpec
from layersync_kernels.sit.teachers import grids
from layersync_kernels.sit.teachers.base import Teacher
from layersync_kernels.sit.teachers.features import Features, compute_features
from layersync_kernels.sit.teachers.grids import load_any, on_grid
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.terms.base import Present
from layersync_kernels.sit.training.terms.repa import RepaTerm

from .tiny import tiny_config

RATE = 8000


def image_teacher(name="tiny", **_):
    """4x4 pixels to 2x2 tokens."""
    torch.manual_seed(1)
    network = nn.Conv2d(3, 5, 2, stride=2)
    return Teacher(name, network, network, 4)


@pytest.fixture(autouse=True)
def _images(monkeypatch):
    monkeypatch.setattr(grids, "load_teacher", image_teacher)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's module: each channel and its square, half as many as there are positions."""
    (tmp_path / "my_teacher.py").write_text(
        "import torch\n"
        "import torch.nn.functional as F\n"
        "def make(modality):\n"
        "    def network(values, lengths):\n"
        "        both = torch.cat([values, values.square()], 1)\n"
        "        return F.avg_pool1d(both, 2) if values.ndim == 3 else F.avg_pool3d(both, 2)\n"
        "    return network\n"
        "def number(modality):\n"
        "    return 3\n"
        "def wrong(modality):\n"
        "    return lambda values, lengths: values[:1]\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "my_teacher:make"
    sys.modules.pop("my_teacher", None)


def sounds(count=6, size=1600):
    """Of a fifth of a second at most, zeros behind each one's end."""
    lengths = torch.tensor([size, size // 2, size // 4, size, size // 2, size // 4])[:count]
    samples = 0.3 * torch.randn(count, 1, size, generator=torch.Generator().manual_seed(0))
    return MemorySet(
        spec=SampleSpec(1, (size,), variable=True),
        num_classes=2,
        class_names=["a", "b"],
        samples=samples * length_mask(lengths, size)[:, None],
        labels=torch.arange(count) % 2,
        lengths=lengths,
        modality=Waveform(sample_rate=RATE),
    )


def films(count=6):
    return MemorySet(
        spec=SampleSpec(1, (4, 4, 4)),
        num_classes=2,
        class_names=["a", "b"],
        samples=torch.randint(0, 256, (count, 1, 4, 4, 4), generator=torch.Generator().manual_seed(0)).byte(),
        labels=torch.arange(count) % 2,
        modality=Video(fps=8.0),
    )


def write(teacher, data, path):
    compute_features(teacher, data, path, source="data", flip=False, batch_size=4, autocast_dtype=None)
    return path


def test_tokens_of_films_are_those_of_their_frames():
    samples = films().take(torch.arange(3)).samples
    images = image_teacher()
    frames = torch.stack([images(frame) for frame in samples.unbind(2)], 1)
    for steps in (4, 2, 1):
        tokens = load_any("tiny", Video(fps=8.0), (steps, 2, 2))(samples)
        expected = frames.unflatten(1, (steps, -1)).mean(2)
        torch.testing.assert_close(tokens, expected.flatten(1, 2))
    coarse = load_any("tiny", Video(fps=8.0), (4, 1, 1))(samples)
    torch.testing.assert_close(coarse, frames.mean(2))


def test_tokens_of_sounds_end_with_them(speech):
    data = sounds()
    batch = data.take(torch.arange(3))
    teacher = load_any("resemblyzer", data.modality, (16,))
    tokens = teacher(batch.samples, batch.condition.lengths)
    assert tokens.shape == (3, 16, 256)
    for i, there in enumerate((16, 8, 4)):
        assert (tokens[i, there:] == 0).all()
        alone = teacher(batch.samples[i : i + 1, :, : there * 100])
        assert alone.shape == (1, 16, 256)
        states = teacher.network.states(batch.samples[i, 0, : there * 100].numpy(), RATE)
        torch.testing.assert_close(tokens[i, :there], on_grid(states.T[None], (there,))[0])
    noisy = batch.samples + 9 * ~length_mask(batch.condition.lengths, 1600)[:, None]
    torch.testing.assert_close(teacher(noisy, batch.condition.lengths), tokens, rtol=0, atol=0)


def test_without_the_package_the_message_says_what_brings_it(monkeypatch):
    monkeypatch.setattr(grids.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TeacherError, match="pip install --no-deps Resemblyzer"):
        load_any("resemblyzer", Waveform(sample_rate=RATE), (4,))


def test_a_users_own_looks_at_what_the_data_holds(own):
    modality = dataclasses.replace(Waveform(sample_rate=RATE), mean=(2.0,), std=(3.0,))
    samples = torch.randn(2, 1, 32)
    values = 3 * samples + 2
    pooled = F.avg_pool1d(torch.cat([values, values**2], 1), 2)
    torch.testing.assert_close(load_any(own, modality, (16,))(samples), pooled.transpose(1, 2))
    eight = F.interpolate(pooled, 8, mode="linear").transpose(1, 2)
    torch.testing.assert_close(load_any(own, modality, (8,))(samples), eight)
    assert load_any(own, Video(fps=8.0), (2, 2, 2))(torch.randn(2, 1, 4, 4, 4)).shape == (2, 8, 2)
    assert load_any("tiny", Images(), None)(torch.zeros(1, 1, 4, 4)).shape == (1, 4, 5)


@pytest.mark.parametrize(
    ("name", "modality", "error", "match"),
    [
        ("tiny", Waveform(sample_rate=RATE), ConfigError, "no such teacher of waveform; expected resemblyzer, or your"),
        ("resemblyzer", Motion(representation="features", fps=20.0), ConfigError, "expected your own, MODULE:FUNCTION"),
        ("no_module:make", Waveform(sample_rate=RATE), TeacherError, "ModuleNotFoundError: No module named"),
        ("my_teacher:number", Waveform(sample_rate=RATE), TeacherError, "returned a int; expected a module"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(own, name, modality, error, match):
    with pytest.raises(error, match=match):
        load_any(name, modality, (4,))


def test_what_is_no_tokens_is_refused(own):
    with pytest.raises(TeacherError, match=r"gives \(1, 4, 1\) for 2 samples of 4 tokens"):
        load_any("my_teacher:wrong", Waveform(sample_rate=RATE), (4,)).width(torch.randn(2, 1, 8))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["films", "sounds"])
def test_a_model_learns_from_them(own, kind, cached, tmp_path):
    data = films() if kind == "films" else sounds()
    patch = 2 if kind == "films" else 100
    name = "tiny" if kind == "films" else own
    config = tiny_config(
        data={"flip": False},
        model={"patch_size": patch},
        align=AlignConfig(align="repa", teacher=name, projector_dim=16),
        optim={"batch_size": 4, "accumulate": 2, "steps": 40},
    )
    if cached:
        grid = (2, 2, 2) if kind == "films" else (16,)
        path = write(load_any(name, data.modality, grid), data, tmp_path / "f.safetensors")
        config = dataclasses.replace(config, align=dataclasses.replace(config.align, features=path))
    trainer = Trainer(config, data)
    trainer.advance(40)
    means = trainer.meter.read()
    assert means["repa_loss"] < -0.05
    assert trainer.term(RepaTerm) is not None


def test_padding_is_not_learnt_from(own):
    """What a network says of tokens beyond a length does not count."""
    data = sounds()
    config = tiny_config(
        data={"flip": False}, model={"patch_size": 100}, align=AlignConfig(align="repa", teacher=own, projector_dim=16)
    )
    term = Trainer(config, data).term(RepaTerm)
    batch = data.take(torch.arange(6))
    (target,) = term.targets(batch, 1)
    states = {block: torch.randn(6, 16, 16) for block in term.module.layers}
    loss = term.loss(states, target, 0)
    there = length_mask(batch.condition.lengths // 100, 16)
    changed = torch.where(there[..., None], target[0], 7.0)
    torch.testing.assert_close(term.loss(states, (changed, target[1]), 0), loss)
    assert not torch.allclose(term.loss(states, (changed, Present()), 0), loss)


def test_features_of_the_command_are_those_of_the_teacher(own, tmp_path, monkeypatch, capsys):
    data = sounds()
    monkeypatch.setattr("layersync_kernels.sit.commands.features.load_data", lambda config, device: data)
    path = tmp_path / "f.safetensors"
    argv = ["features", "--teacher", own, "--out", str(path), "--precision", "fp32", "--grid"]
    assert cli.main([*argv, "8"]) == 0
    assert "6 x 8 x 2 features of my_teacher:make" in capsys.readouterr().out
    index = torch.tensor([4, 0])
    batch = data.take(index)
    expected = load_any(own, data.modality, (8,))(batch.samples, batch.condition.lengths)
    torch.testing.assert_close(Features(path, data).tokens(index).float(), expected, rtol=2e-3, atol=2e-3)
    assert cli.main([*argv, "8", "8"]) != 0
    assert "expected 1 numbers for samples of" in capsys.readouterr().err
