"""`layersync compare` judges each kind of data by the network that `layersync evaluate` has for it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from layersync_kernels.errors import ConfigError, DataError
from layersync_kernels.sit.config.audio import AudioConfig
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.config.video import VideoConfig
from layersync_kernels.sit.diffusion.transport import build_transport
from layersync_kernels.sit.evaluation import motion_classifier, networks
from layersync_kernels.sit.evaluation.frechet import RealFeatures
from layersync_kernels.sit.evaluation.motion_classifier import MotionNetwork
from layersync_kernels.sit.evaluation.networks import FilmNetwork, ImageNetwork, SpeechFeatures
from layersync_kernels.sit.evaluation.validation import take
from layersync_kernels.sit.modality.images import Images, unit_to_pixels
from layersync_kernels.sit.modality.latents import Latents
from layersync_kernels.sit.sampling.draw import draw
from layersync_kernels.sit.studies.compare import run as compare_module
from layersync_kernels.sit.studies.compare.command import compare
from layersync_kernels.sit.studies.compare.config import CompareCommand, CompareConfig
from layersync_kernels.sit.studies.compare.run import Comparison

from .tiny import tiny_config
from .tiny_samples import bodies, films, images, tiny_network, tones

CPU = torch.device("cpu")
HELD_OUT, SAMPLES = 20, 24


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(networks, "load_teacher", tiny_network)
    monkeypatch.setattr(motion_classifier, "STEPS", 30)
    monkeypatch.setattr(motion_classifier, "WIDTH", 8)
    monkeypatch.setattr(SpeechFeatures, "directions", 8)
    monkeypatch.setattr(compare_module, "measure_memory", lambda config, run: None)


def comparison(data, patch_size=1, **changes):
    """Two methods of one seed and two steps."""
    train = tiny_config(
        data=data,
        model={"patch_size": patch_size, "hidden_size": 8},
        optim={"steps": 2, "accumulate": 1},
        sampling={"sampling_steps": 2, "cfg_scale": 1.5},
    )
    options = {"methods": ("vanilla", "layersync"), "seeds": 1, "marks": 1, "held_out": HELD_OUT, "samples": SAMPLES}
    return CompareConfig(train, **(options | changes))


def numbers(count):
    """Of the samples that are trained on, and of those that are held out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).numpy()
    return np.sort(order[HELD_OUT:]), order[:HELD_OUT]


def parts(arrays):
    """Arrays of all samples as those of both sets."""
    count = len(next(iter(arrays.values())))
    return [{name: own[index] if own.ndim else own for name, own in arrays.items()} for index in numbers(count)]


def of_images(folder):
    pixels, labels = images(60)
    np.savez(folder / "data.npz", images=pixels, labels=labels)
    return DataConfig(data=str(folder / "data.npz")), 2, {"arr_0": pixels}


def of_films(folder):
    moving = films(60, np.random.default_rng(0))
    np.savez(folder / "data.npz", videos=moving)
    return DataConfig(data=str(folder / "data.npz"), video=VideoConfig(frames=4)), (2, 4, 4), {"videos": moving}


def of_sounds(folder):
    tones(folder / "data", 26)
    soundfile = pytest.importorskip("soundfile")
    files = sorted((folder / "data").rglob("*.wav"), key=lambda path: (path.parent.name, path.name))
    sounds = [soundfile.read(path, dtype="float32")[0] for path in files]
    waveforms = np.zeros((len(sounds), max(map(len, sounds))), np.float32)
    for row, sound in zip(waveforms, sounds, strict=True):
        row[: len(sound)] = sound
    arrays = {"waveforms": waveforms, "lengths": np.array([len(sound) for sound in sounds])}
    audio = AudioConfig(mel_bins=20, window_ms=32.0, hop_ms=16.0)
    return DataConfig(data=str(folder / "data"), audio=audio), 1, arrays | {"sample_rate": np.array(8000)}


def of_motion(folder):
    bodies(folder / "data.npz", 60)
    positions = np.load(folder / "data.npz")["positions"]
    return DataConfig(data=str(folder / "data.npz")), 1, {"positions": positions, "lengths": np.full(60, 16)}


def network_of(kind, shared, folder):
    if kind == "audio":
        return SpeechFeatures(CPU)
    if kind == "motion":
        return MotionNetwork(shared.train_set, shared.held_out, folder)
    own = ImageNetwork("efficientnet-lite0", CPU, size=64 if kind == "video" else None, weights=None)
    return FilmNetwork(own) if kind == "video" else own


@pytest.mark.parametrize(
    ("kind", "make", "name", "dimensions"),
    [
        ("images", of_images, "(FD): 24 samples", 6),
        ("video", of_films, "(FD): 24 samples", 6),
        ("audio", of_sounds, "(FAD): 24 samples", 8),
        ("motion", of_motion, "(FD): 24 samples", 8),
    ],
)
def test_distance_is_that_of_the_networks_of_evaluate(kind, make, name, dimensions, tmp_path, request):
    if kind == "audio":
        request.getfixturevalue("speech")
    data, patch_size, arrays = make(tmp_path)
    config, out = comparison(data, patch_size), tmp_path / "out"
    report = compare(CompareCommand(config, out)).read_text()
    shared = Comparison(config, out)
    trained, held_out = parts(arrays)
    network = network_of(kind, shared, tmp_path / "other")
    real = RealFeatures(network(trained, "real").features, network.directions)
    given = next(take(shared.train_set, SAMPLES)).condition
    for run in shared.runs:
        run.read()
        trainer = shared._open(run)
        transport, sampling = build_transport(run.config.transport), run.config.sampling
        drawn = draw(trainer.ema, transport, sampling, given, seed=0)
        restored = shared.train_set.modality.arrays(drawn, given.lengths)
        own = {key: value for key, value in restored.items() if key in arrays}
        mark = run.marks[-1]
        assert mark["frechet"] == pytest.approx(real.distance(network(own, "drawn").features), rel=1e-4)
        assert mark["frechet_floor"] == pytest.approx(real.distance(network(held_out, "x").features), rel=1e-4)
        assert 0 < mark["frechet_floor"] < mark["frechet"] < np.inf
        assert mark["frechet_dimensions"] == real.dimensions == dimensions
    assert f"Fréchet distance {name}, drawn by ode, euler, 2 steps, guidance 1.5, from" in report
    count = len(trained[next(iter(arrays))])
    assert f"against {count} of the training set, in the first {dimensions} principal directions" in report
    assert f"features of {network.name}" in report
    assert f"20 held-out ones are at {mark['frechet_floor']:.4g}" in report


def test_sounds_have_lengths_of_their_own(tmp_path, speech, monkeypatch):
    data, patch_size, _ = of_sounds(tmp_path)
    shared = Comparison(comparison(data, patch_size), tmp_path / "out")
    heard = []
    see = SpeechFeatures.see
    monkeypatch.setattr(SpeechFeatures, "see", lambda self, own: heard.append(own["lengths"]) or see(self, own))
    judge = shared._judge
    judge.frechet(shared._open(shared.runs[0]).ema)
    lengths = next(take(shared.train_set, SAMPLES)).condition.lengths
    assert len(lengths.unique()) > 1
    np.testing.assert_allclose(heard[-1], 128 * (lengths.numpy() - 1), atol=128)


def test_too_few_samples_are_refused_before_anything_is_written(tmp_path):
    data, patch_size, _ = of_images(tmp_path)
    out = tmp_path / "out"
    for changes, counts in (({"samples": 6}, "6 samples and 40"), ({"reference": 5}, "24 samples and 5")):
        config = comparison(data, patch_size, **changes)
        message = f"by efficientnet-lite0 of {counts} real ones for 6 dimensions.*at least 7 by --samples.*network none"
        with pytest.raises(ConfigError, match=message):
            compare(CompareCommand(config, out))
    assert not out.exists()


def test_held_out_samples_too_few_for_a_floor_have_none(tmp_path):
    data, patch_size, _ = of_images(tmp_path)
    report = compare(CompareCommand(comparison(data, patch_size, held_out=6), tmp_path / "out")).read_text()
    assert "6 held-out ones are too few for that" in report
    marks = json.loads((tmp_path / "out/report.json").read_text())["runs"][0]["marks"]
    assert marks[-1]["frechet_floor"] is None
    assert marks[-1]["frechet"] > 0


def test_motion_without_classes_has_losses_alone(tmp_path):
    data, patch_size, _ = of_motion(tmp_path)
    arrays = dict(np.load(data.data))
    np.savez(data.data, **{name: own for name, own in arrays.items() if name != "labels"})
    config, out = comparison(data, patch_size), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"the data has one class: .*or leave the distance out by --quality-network"):
        compare(CompareCommand(config, out))
    assert not out.exists()
    report = compare(CompareCommand(dataclasses.replace(config, quality_network="none"), out)).read_text()
    assert "Fréchet" not in report
    marks = json.loads((out / "report.json").read_text())["runs"][0]["marks"]
    assert [mark["frechet"] for mark in marks] == [None, None]
    assert not (tmp_path / "cache").exists()


def test_the_network_of_motion_is_tried_on_the_test_split_of_the_data(tmp_path):
    data, patch_size, _ = of_motion(tmp_path)
    for split, trained_on, windows in (("all", 40, 20), ("train", 34, 6)):
        shared = Comparison(comparison(dataclasses.replace(data, split=split), patch_size), tmp_path / "out")
        assert (shared._network.facts.trained_on, shared._network.facts.windows) == (trained_on, windows)


def test_latents_without_their_autoencoder_are_refused(tmp_path):
    latents = torch.randn(60, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents}, tmp_path / "data.safetensors")
    config = comparison(DataConfig(data=str(tmp_path / "data.safetensors")), 2)
    with pytest.raises(DataError, match=r"holds latents.*fetch it, or leave the distance out by --quality-network"):
        compare(CompareCommand(config, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_latents_are_judged_as_what_they_decode_to(tmp_path, monkeypatch):
    latents = torch.randn(60, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents}, tmp_path / "data.safetensors")
    monkeypatch.setattr(Latents, "decoded", lambda self, samples: (Images(), self.restore(samples)[:, :1] / 4))
    shared = Comparison(comparison(DataConfig(data=str(tmp_path / "data.safetensors")), 2), tmp_path / "out")
    trained, held_out = parts({"arr_0": unit_to_pixels(latents[:, :1] / 4).permute(0, 2, 3, 1).numpy()})
    real, others = (shared._network(own, "x").features for own in (trained, held_out))
    assert shared._judge.floor == pytest.approx(RealFeatures(real, 256).distance(others), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (of_motion, "timm/x", "--quality-network timm/x: no such network of motion; expected motion-classifier"),
        (of_images, "inception", "--quality-network inception takes a file of weights.*layersync evaluate RUN"),
        (of_films, "i3d", "--quality-network i3d takes a file of weights"),
    ],
)
def test_networks_that_cannot_judge_are_named(tmp_path, make, name, message):
    data, patch_size, _ = make(tmp_path)
    with pytest.raises(ConfigError, match=message):
        compare(CompareCommand(comparison(data, patch_size, quality_network=name), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_features_of_real_samples_are_computed_once_for_a_data_set(tmp_path, monkeypatch):
    data, patch_size, _ = of_images(tmp_path)
    seen, see = [], ImageNetwork.see

    def counted(self, arrays):
        seen.append(len(arrays["arr_0"]))
        return see(self, arrays)

    monkeypatch.setattr(ImageNetwork, "see", counted)
    judges = [Comparison(comparison(data, patch_size), tmp_path / name)._judge for name in ("one", "two")]
    assert sum(seen) == 60  # 20 held out, 40 to compare with
    assert judges[0].floor == judges[1].floor
    fewer = dataclasses.replace(comparison(data, patch_size), reference=30)
    _ = Comparison(fewer, tmp_path / "three")._judge
    assert sum(seen) == 90
