"""`layersync evaluate`: what it draws, what it compares that with, what it refuses."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from layersync_kernels import cli
from layersync_kernels.errors import CheckpointError, ConfigError, DataError, TeacherError
from layersync_kernels.sit.commands import evaluate as command
from layersync_kernels.sit.commands.evaluate import EvaluateCommand, evaluate
from layersync_kernels.sit.commands.train import run_training
from layersync_kernels.sit.config.audio import AudioConfig
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.config.sampling import SamplingConfig
from layersync_kernels.sit.config.video import VideoConfig
from layersync_kernels.sit.evaluation import motion_classifier, networks
from layersync_kernels.sit.evaluation.controls import disturbed
from layersync_kernels.sit.evaluation.frechet import Gaussian, frechet_distance
from layersync_kernels.sit.evaluation.metrics import inception_score
from layersync_kernels.sit.evaluation.networks import FilmClassifier, FilmNetwork, ImageNetwork, InceptionNetwork
from layersync_kernels.sit.teachers.base import IMAGENET_MEAN, IMAGENET_STD

from .tiny import tiny_config
from .tiny_samples import bodies, films, images, tiny_network, tones

FAST = SamplingConfig(solver="euler", sampling_steps=2)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(networks, "load_teacher", tiny_network)
    monkeypatch.setattr(motion_classifier, "STEPS", 100)


def train(folder, data, **model):
    model = {"patch_size": 2, "hidden_size": 8, "class_dropout": 0.1} | model
    config = tiny_config(data=data, model=model, optim={"steps": 2, "accumulate": 1}, log={"sample_every": 0})
    run_training(dataclasses.replace(config, sampling=FAST), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A run on 120 images, of which a tenth is the test split."""
    folder = tmp_path_factory.mktemp("photos")
    pixels, labels = images(120)
    np.savez(folder / "data.npz", images=pixels, labels=labels)
    return train(folder, DataConfig(data=str(folder / "data.npz")))


def asked(run, cache, **changes):
    own = json.loads((run / "config.json").read_text())["data"]
    data = DataConfig(
        data=own["data"], data_root=own["data_root"], split=own["split"], video=changes.pop("video", DataConfig().video)
    )
    data = dataclasses.replace(data, audio=changes.pop("audio", data.audio), motion=changes.pop("motion", data.motion))
    options = {"data": data, "samples": 30, "sampling": FAST, "real_cache": cache, "resamples": 10, "device": "cpu"}
    return EvaluateCommand(run, **(options | changes))


def values(report, control=None):
    found = report.found if control is None else report.controls[control][1]
    return {name: own if isinstance(own, str) else own.value for name, own in found.items()}


def test_numbers_of_images_are_those_of_their_features(photos, tmp_path):
    report = evaluate(asked(photos, tmp_path, samples_to=tmp_path / "drawn.npz", real_to=tmp_path / "real.npz"))
    drawn, real = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("drawn", "real"))
    assert (drawn["arr_0"].shape, drawn["arr_0"].dtype) == ((30, 8, 8, 1), np.uint8)
    assert np.bincount(drawn["arr_1"]).tolist() == [15, 15]
    network = ImageNetwork("efficientnet-lite0", CPU, size=None, weights=None)
    seen, other = (network({"arr_0": own["arr_0"]}, "x") for own in (drawn, real))
    assert len(other) == 120
    expected = frechet_distance(*(Gaussian.of(own.features) for own in (seen, other)))
    assert report.found["FD"].value == pytest.approx(expected, rel=1e-9)
    expected = frechet_distance(*(Gaussian.of(own.sets["spatial"]) for own in (seen, other)))
    assert seen.sets["spatial"].shape == (30, 7 * 4)
    assert report.found["sFD"].value == pytest.approx(expected, rel=1e-9)
    assert list(report.found) == ["FD", "sFD", "KID", "precision", "recall", "IS"]
    halves = (Gaussian.of(own.features) for own in (other[:60], other[60:]))
    assert report.controls["real"][1]["FD"].value == pytest.approx(frechet_distance(*halves), rel=1e-9)
    maps = tiny_network("x").network._blocks
    inner = torch.cat([maps(images) for images in _normalised(drawn["arr_0"]).split(7)])
    torch.testing.assert_close(seen.sets["spatial"], inner[:, :7].flatten(2).transpose(1, 2).flatten(1))
    torch.testing.assert_close(seen.logits, tiny_network("x").network._fc(seen.features))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert report.found["IS"].value == pytest.approx(inception_score(seen.logits[order]), rel=1e-9)
    for own in report.found.values():
        assert own.low <= own.value <= own.high
    assert report.found["FD"].low < report.found["FD"].high


def _normalised(pixels):
    """As torchvision has it for networks of ImageNet."""
    mean, std = (torch.tensor(own).view(3, 1, 1) for own in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std


def test_controls_show_what_a_number_means(photos, tmp_path):
    report = evaluate(asked(photos, tmp_path))
    assert {name: count for name, (count, _) in report.controls.items()} == {"real": 60, "blurred": 60, "noisy": 60}
    for name in ("FD", "KID"):
        real, blurred = (
            values(report, control)[name] for control in ("real", "blurred")
        )  # this network averages noise
        assert real < blurred
        assert real < values(report)[name]  # two steps of training draw noise
    text = "\n".join(report.lines())
    assert "30 samples" in text
    assert "drawn by ode, euler, 2 steps, guidance 1, seed 0" in text
    assert "120 real ones" in text
    assert "copies of them would look good" in text


def test_real_samples_are_seen_once_per_data_set(photos, tmp_path, monkeypatch):
    seen = []
    call = networks.Network.__call__

    def counted(self, arrays, what):
        seen.append(what)
        return call(self, arrays, what)

    monkeypatch.setattr(networks.Network, "__call__", counted)
    first = evaluate(asked(photos, tmp_path))
    assert seen == ["real", "blurred", "noisy", "drawn"]
    (path,) = tmp_path.glob("real-*.safetensors")
    again = evaluate(asked(photos, tmp_path))
    assert seen[4:] == ["drawn"]
    assert again.content() == first.content()
    assert list(again.controls) == list(first.controls) == ["real", "blurred", "noisy"]
    path.write_bytes(path.read_bytes()[:100])
    assert evaluate(asked(photos, tmp_path)).content() == first.content()
    assert seen[5:] == ["real", "blurred", "noisy", "drawn"]
    evaluate(asked(photos, tmp_path, reference=100))
    assert seen[9:] == ["real", "blurred", "noisy", "drawn"]


def test_samples_are_drawn_once_and_go_on(photos, tmp_path):
    command = asked(photos, tmp_path, samples=40, seed=3)
    before = set((photos / "samples").iterdir()) if (photos / "samples").is_dir() else set()
    first = evaluate(command)
    (folder,) = set((photos / "samples").iterdir()) - before
    (part,) = folder.glob("samples_*.npz")
    changed = part.stat().st_mtime_ns
    assert evaluate(command).content() == first.content()
    assert part.stat().st_mtime_ns == changed
    evaluate(dataclasses.replace(command, seed=4))
    assert len(set((photos / "samples").iterdir()) - before) == 2


def test_classes_are_drawn_in_the_proportions_of_the_real_ones():
    labels = torch.tensor([0] * 60 + [1] * 30 + [3] * 10)[torch.randperm(100)]
    for count in (20, 200):
        drawn = torch.tensor(command.in_proportion(labels, count))
        assert (drawn.bincount() * 10 / count).tolist() == [6, 3, 0, 1]
        assert drawn.tolist() != drawn.sort().values.tolist()


def test_samples_of_a_file_are_measured_as_if_drawn(photos, tmp_path):
    drawn = evaluate(asked(photos, tmp_path, samples_to=tmp_path / "drawn.npz"))
    given = evaluate(asked(photos, tmp_path, samples_from=tmp_path / "drawn.npz"))
    assert values(given) == values(drawn)
    assert "drawn one does not know how" in given.lines()[0]
    np.savez(tmp_path / "real.npz", arr_0=images(40, seed=1)[0])
    assert values(evaluate(asked(photos, tmp_path, samples_from=tmp_path / "real.npz")))["FD"] < values(drawn)["FD"]


def test_the_test_split_is_what_a_run_on_the_training_split_is_compared_with(tmp_path):
    pixels, labels = images(300)
    np.savez(tmp_path / "data.npz", images=pixels, labels=labels)
    run = train(tmp_path, DataConfig(data=str(tmp_path / "data.npz"), split="train"))
    assert evaluate(asked(run, tmp_path)).settings["real"]["count"] == 30
    report = evaluate(asked(run, tmp_path, real_split="train"))
    assert report.settings["real"]["count"] == 270
    assert report.settings["real"]["split"] == "training split"


def test_too_few_samples_are_refused_by_their_numbers(photos, tmp_path, capsys):
    report = evaluate(asked(photos, tmp_path, samples=20))
    assert "20 samples and 120 real ones for 28 dimensions" in report.found["sFD"]
    assert report.found["FD"].value > 0
    assert any("sFD is refused: 20 samples" in line for line in report.lines())
    content = report.content()["metrics"]["sFD"]
    assert "value" not in content
    assert content["controls"]["real"]["value"] > 0  # of 60
    assert isinstance(evaluate(asked(photos, tmp_path, samples=20, directions=8)).found["sFD"].value, float)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": images(30)[0][:, :6]}, r"\(30, 6, 8, 1\), the real samples are \(8, 8, 1\)"),
        ({"arr_0": images(30)[0].repeat(3, -1)}, "of that size"),
        ({"arr_0": images(30)[0] / np.float32(255)}, "as float32; expected uint8"),
        ({"arr_0": images(30)[0] // 200}, "from 0 to 1; expected pixels"),
        ({"arr_0": images(19)[0]}, "19 samples; expected at least 20"),
        ({"videos": images(30)[0]}, r"holds \['videos'\]; expected samples of images under 'arr_0'"),
        ({"arr_0": images(30)[0], "arr_1": np.zeros(29, int)}, r"labels have shape \(29,\)"),
    ],
)
def test_files_of_other_samples_are_refused(photos, tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        evaluate(asked(photos, tmp_path, samples_from=tmp_path / "x.npz"))


def test_features_that_are_not_finite_are_refused(photos, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        teacher = tiny_network("x")
        teacher.network.last.weight.data[0] = float("nan")
        return teacher

    monkeypatch.setattr(networks, "load_teacher", broken)
    with pytest.raises(TeacherError, match="the features by efficientnet-lite0 of 120 of 120 real samples"):
        evaluate(asked(photos, tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": 19}, ConfigError, "--samples 19: expected at least 20"),
        ({"resamples": 1}, ConfigError, "--resamples 1"),
        ({"directions": 1}, ConfigError, "--directions 1"),
        ({"reference": 5}, ConfigError, "--reference 5"),
        ({"data": DataConfig(data="nowhere")}, DataError, "give the data of real samples by --data"),
        ({"samples_from": "nowhere.npz"}, DataError, "nowhere.npz"),
    ],
)
def test_nonsense_is_refused(photos, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        evaluate(asked(photos, tmp_path, **changes))


def test_networks_that_are_missing_say_what_brings_them(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"i3d_torchscript\.pt of StyleGAN-V, by --features-weights"):
        FilmClassifier(CPU, None)
    (tmp_path / "x.pt").write_bytes(b"no network")
    with pytest.raises(CheckpointError, match=r"x\.pt is no TorchScript file"):
        FilmClassifier(CPU, tmp_path / "x.pt")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ConfigError, match=r"--features inception needs a package: .*layersync_kernels\[fid\]"):
        InceptionNetwork(CPU, None)

    def unknown(name, **options):
        raise ConfigError(f"--teacher {name}: no such teacher")

    monkeypatch.setattr(networks, "load_teacher", unknown)
    with pytest.raises(ConfigError, match="--features nonsense: --teacher nonsense: no such teacher"):
        ImageNetwork("nonsense", CPU, size=None, weights=None)


def test_i3d_is_given_bytes_of_three_colours(tmp_path):
    class Film(nn.Module):
        def forward(self, films: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
            assert rescale
            assert resize
            assert return_features
            return films.flatten(2).mean(2)

    torch.jit.script(Film()).save(str(tmp_path / "i3d.pt"))
    films = np.random.default_rng(0).integers(0, 256, (20, 3, 4, 4, 1), dtype=np.uint8)
    seen = FilmClassifier(CPU, tmp_path / "i3d.pt")({"videos": films}, "x")
    torch.testing.assert_close(seen.features, torch.from_numpy(films).float().mean((1, 2, 3)).expand(-1, 3))


@pytest.mark.slow
def test_inception_has_the_maps_of_adm(tmp_path):
    """With random weights; the published ones take a download."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    with pytest.raises(ConfigError, match=r"weights-inception-2015-12-05.*by --features-weights"):
        InceptionNetwork(CPU, None)
    seen = InceptionNetwork(CPU, tmp_path / "inception.pth")({"arr_0": images(2)[0]}, "x")
    assert seen.features.shape == (2, 2048)
    assert seen.sets["spatial"].shape == (2, 7 * 17 * 17)
    assert seen.logits.shape == (2, 1008)
    (tmp_path / "y.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"y\.pth"):
        InceptionNetwork(CPU, tmp_path / "y.pth")


# Films


def test_films_have_a_distance_of_looks_and_one_of_changes(tmp_path):
    """Films that stand still look like those that move, and do not change like them."""
    generator = np.random.default_rng(0)
    moving = films(80, generator)
    np.savez(tmp_path / "data.npz", videos=moving, labels=np.arange(80) % 2)
    frames = VideoConfig(frames=4)
    run = train(tmp_path, DataConfig(data=str(tmp_path / "data.npz"), video=frames), patch_size=(2, 4, 4))
    report = evaluate(asked(run, tmp_path, video=frames, json=tmp_path / "x.json"))
    assert list(report.found) == ["FD", "FD of changes", "KID", "precision", "recall"]
    images = ImageNetwork("efficientnet-lite0", CPU, size=64, weights=None)
    seen = FilmNetwork(images)({"videos": moving[:3]}, "x")
    own = torch.stack([images({"arr_0": moving[:3, t]}, "x").features for t in range(4)], 1)
    torch.testing.assert_close(seen.features, own.mean(1))
    torch.testing.assert_close(seen.sets["changes"], (own[:, 1:] - own[:, :-1]).abs().mean(1))
    still = np.broadcast_to(moving[:, :1], moving.shape)
    shuffled = np.stack([film[generator.permutation(4)] for film in moving])
    found = {}
    for name, own in (("real", moving), ("still", still), ("shuffled", shuffled)):
        np.savez(tmp_path / f"{name}.npz", videos=own)
        found[name] = values(evaluate(asked(run, tmp_path, video=frames, samples_from=tmp_path / f"{name}.npz")))
    assert found["shuffled"]["FD"] == pytest.approx(found["real"]["FD"], abs=1e-3)
    assert found["still"]["FD of changes"] > 100 * abs(found["real"]["FD of changes"])
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["metrics"]["FD"]["interval"][0] <= content["metrics"]["FD"]["value"]
    assert content["samples"]["solver"] == "euler"


# Motion


@pytest.fixture(scope="module")
def swings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swings")
    bodies(folder / "data.npz", 240)
    return train(folder, DataConfig(data=str(folder / "data.npz"), split="train"), patch_size=1)


def test_motion_is_seen_by_a_classifier_that_is_kept(swings, tmp_path, monkeypatch):
    trained = []
    own = command.MotionNetwork._train
    monkeypatch.setattr(command.MotionNetwork, "_train", lambda *given: trained.append(0) or own(*given))
    report = evaluate(asked(swings, tmp_path))
    expected = ["FD", "KID", "precision", "recall", "diversity", "multimodality"]
    assert list(report.found) == [*expected, *(f"R-precision@{top}" for top in (1, 2, 3))]
    assert report.settings["network"]["accuracy"] > 0.9
    assert report.settings["network"]["windows"] == 24
    assert report.controls["real"][1]["R-precision@1"].value > 0.9
    assert report.found["R-precision@2"].value == 1
    assert isinstance(report.found["FD"], str)  # 24 test windows for 64 dimensions
    evaluate(asked(swings, tmp_path, directions=8))
    assert len(trained) == 1
    (path,) = tmp_path.glob("motion-classifier-*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is not what was written .*delete both"):
        evaluate(asked(swings, tmp_path))


def test_motion_without_classes_is_refused(tmp_path):
    bodies(tmp_path / "data.npz", 60)
    arrays = dict(np.load(tmp_path / "data.npz"))
    np.savez(tmp_path / "data.npz", **{name: own for name, own in arrays.items() if name != "labels"})
    run = train(tmp_path, DataConfig(data=str(tmp_path / "data.npz")), patch_size=1)
    with pytest.raises(ConfigError, match="the data has one class: nothing can be measured"):
        evaluate(asked(run, tmp_path))


# Sounds


def test_sounds_are_heard_beside_their_representation(speech, tmp_path):
    tones(tmp_path / "data", 25)
    audio = AudioConfig(mel_bins=20, window_ms=32.0, hop_ms=16.0)
    run = train(tmp_path, DataConfig(data=str(tmp_path / "data"), audio=audio), patch_size=1)
    report = evaluate(asked(run, tmp_path, audio=audio, directions=8, samples_to=tmp_path / "drawn.npz"))
    assert list(report.found) == ["FAD", "KID", "precision", "recall", "KL of posteriors", "recognised"]
    assert list(report.controls) == ["real", "blurred", "noisy", "represented"]
    assert values(report, "real")["recognised"] > 0.9
    assert values(report, "real")["KL of posteriors"] < values(report)["KL of posteriors"]
    assert values(report, "real")["FAD"] < values(report)["FAD"]
    arrays = dict(np.load(tmp_path / "drawn.npz"))
    np.savez(tmp_path / "fast.npz", **(arrays | {"sample_rate": np.array(16000)}))
    with pytest.raises(DataError, match="sounds at 'sample_rate' 16000, the real ones have 8000"):
        evaluate(asked(run, tmp_path, audio=audio, samples_from=tmp_path / "fast.npz"))
    np.savez(tmp_path / "long.npz", **(arrays | {"lengths": arrays["lengths"] + 10**6}))
    with pytest.raises(DataError, match="gives lengths"):
        evaluate(asked(run, tmp_path, audio=audio, samples_from=tmp_path / "long.npz"))
    with pytest.raises(ConfigError, match="no such network of audio; expected resemblyzer"):
        evaluate(asked(run, tmp_path, audio=audio, features="vggish"))


# Controls


@pytest.mark.parametrize("how", ["blurred", "noisy"])
def test_disturbed_samples_keep_their_shape_and_their_silence(how):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    changed = disturbed({"arr_0": pixels}, how)["arr_0"]
    assert (changed.shape, changed.dtype) == (pixels.shape, np.uint8)
    rough = [np.abs(np.diff(own.astype(float), axis=1)).mean() for own in (pixels, changed)]
    assert rough[1] < rough[0] if how == "blurred" else np.abs(changed - pixels.astype(float)).mean() > 10
    film = disturbed({"videos": pixels[:, None].repeat(2, 1)}, how)["videos"]
    assert np.array_equal(film[:, 0], changed) == (how == "blurred")
    sounds = {
        "waveforms": np.zeros((2, 100), np.float32),
        "lengths": np.array([40, 100]),
        "sample_rate": np.array(8000),
    }
    sounds["waveforms"][:, :40] = generator.normal(0, 0.3, (2, 40))
    changed = disturbed(sounds, how)["waveforms"]
    assert not changed[0, 40:].any()
    assert np.abs(changed - sounds["waveforms"]).max() > 0.05
    motion = {"positions": generator.normal(0, 1, (2, 9, 4, 3)).astype(np.float32), "lengths": np.array([5, 9])}
    motion["positions"][0, 5:] = 0
    changed = disturbed(motion, how)["positions"]
    assert not changed[0, 5:].any()
    assert changed.dtype == np.float32
    assert not np.allclose(changed[1], motion["positions"][1], atol=0.01)


def test_the_command_prints_and_writes(photos, tmp_path, capsys):
    flags = [
        "--samples=20",
        "--resamples=4",
        f"--real-cache={tmp_path}",
        f"--json={tmp_path / 'x.json'}",
        "--device=cpu",
    ]
    assert cli.main(["evaluate", str(photos), *flags]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "20 samples" in printed
    assert "by features of efficientnet-lite0" in printed
    assert "noisy 60" in printed
    assert "…" not in printed
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["samples"]["count"] == 20
    assert content["samples"]["steps"] == 2
    assert content["dimensions"] == {"FD": 6, "sFD": 28}
    assert set(content["metrics"]["KID"]) == {"value", "interval", "controls", "better"}
    assert cli.main(["evaluate", str(tmp_path / "nowhere")]) == 1
