"""Latents: data encoded once by an autoencoder, read again, and decoded to be seen and heard."""

import dataclasses
import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from layersync_kernels import cli
from layersync_kernels.errors import ConfigError, DataError
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.config.video import VideoConfig
from layersync_kernels.sit.data import latents_folder
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.modality import latents
from layersync_kernels.sit.modality.autoencoder import Autoencoder
from layersync_kernels.sit.modality.images import unit_to_pixels
from layersync_kernels.sit.modality.latents import Latents
from layersync_kernels.sit.models.sit import SiT

diffusers = pytest.importorskip("diffusers")
soundfile = pytest.importorskip("soundfile")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    """An autoencoder of images: 16x16 to 4 channels of 8x8."""
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    path = tmp_path_factory.mktemp("kl")
    network.save_pretrained(path / "vae")
    return path


@pytest.fixture(scope="module")
def oobleck(tmp_path_factory):
    """An autoencoder of sounds: 8 samples to one of 2 channels."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = diffusers.AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=2,
            audio_channels=2,
            sampling_rate=8000,
        )
    path = tmp_path_factory.mktemp("oobleck")
    network.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """An autoencoder of films: 5x16x16 to 4 channels of 2x4x4."""
    torch.manual_seed(0)
    network = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.5, -0.5, 0.0, 0.25],
        latents_std=[2.0, 1.0, 0.5, 4.0],
    )
    path = tmp_path_factory.mktemp("wan")
    network.save_pretrained(path)
    return path


@pytest.fixture
def pictures(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            noise = np.random.default_rng(10 * ord(name) + i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path


def encode(folder, autoencoder, *more):
    argv = ["latents", f"--data={folder / 'data'}", f"--autoencoder={autoencoder}", f"--out={folder / 'latents'}"]
    return cli.main([*argv, "--shard=4", "--batch-size=3", "--device=cpu", "--workers=0", *more])


def load(folder, **options):
    return load_data(DataConfig(data=str(folder / "latents"), **options))


def test_latents_are_posteriors_of_the_samples(pictures, kl, capsys):
    assert encode(pictures, kl, "--flip") == 0
    assert "6 latents of 4 x 8 x 8" in capsys.readouterr().out
    network = Autoencoder(str(kl), CPU)
    samples = load_data(DataConfig(data=str(pictures / "data"), workers=0)).take(torch.arange(6)).samples
    mean, std = network.encode(samples)
    data = load(pictures, latent_sample="mean")
    assert data.class_names == ["a", "b"]
    batch = data.take(torch.arange(6))
    torch.testing.assert_close(batch.samples, (mean - 0.25) * 0.5, rtol=2e-3, atol=2e-3)
    assert batch.labels.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(data.parts["std"].float(), std, rtol=2e-3, atol=1e-3)
    mirrored, _ = network.encode(samples.flip(-1))
    torch.testing.assert_close(data.parts["mean_mirrored"].float(), mirrored, rtol=2e-3, atol=2e-3)


def test_each_epoch_draws_anew_and_the_same_at_the_same_place(pictures, kl):
    encode(pictures, kl, "--flip")
    data = load(pictures, flip=True)
    first, second = itertools.islice(data.batches(6, seed=0), 2)
    assert not torch.allclose(first.samples[first.index.argsort()], second.samples[second.index.argsort()])
    again = next(data.batches(6, seed=0, start=6))
    assert torch.equal(again.samples, second.samples)
    assert torch.equal(again.mirrored, second.mirrored)
    # The share that is mirrored, and what that means.
    many = list(itertools.islice(data.batches(6, seed=3), 30))
    share = torch.cat([batch.mirrored.flatten() for batch in many]).float().mean()
    assert 0.3 < share < 0.7
    means = dataclasses.replace(data, posterior=False)
    batch = next(means.batches(6, seed=0))
    for own, mirrored, number in zip(batch.samples, batch.mirrored.flatten(), batch.index, strict=True):
        expected = data.parts["mean_mirrored" if mirrored else "mean"][number].float()
        torch.testing.assert_close(own, (expected - 0.25) * 0.5)


def test_writing_goes_on_where_it_was_stopped(pictures, kl, monkeypatch):
    real, calls = latents_folder.save_shard, []

    def stopped(path, tensors):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(latents_folder, "save_shard", stopped)
        assert encode(pictures, kl) == 130
    with pytest.raises(DataError, match=r"lacks 1 of 2 files, such as latents_00001"):
        load(pictures)
    before = (pictures / "latents" / "latents_00000.safetensors").stat().st_mtime_ns
    assert encode(pictures, kl) == 0
    assert (pictures / "latents" / "latents_00000.safetensors").stat().st_mtime_ns == before
    assert len(load(pictures)) == 6


def test_latents_of_something_else_are_not_mixed(pictures, kl, capsys):
    encode(pictures, kl)
    assert encode(pictures, kl, "--image-size=8") == 1
    assert "choose another --out" in capsys.readouterr().err
    with pytest.raises(DataError, match="no latents of mirrored samples"):
        load(pictures, flip=True)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda folder: (folder / "index.json").write_text("{"), "cannot read .*index.json"),
        (lambda folder: declare(folder, fps=0), "cannot read .*index.json: fps is 0"),
        (lambda folder: (folder / "latents_00001.safetensors").write_bytes(b"x"), "cannot read .*latents_00001"),
        (lambda folder: change(folder, mean=torch.zeros(3, 4, 8, 8)), "do not fit index.json"),
        (lambda folder: change(folder, labels=torch.tensor([0, 1, 2, 0])), "labels are not those of 2 classes"),
        (lambda folder: change(folder, std=torch.full((4, 4, 8, 8), torch.inf).half()), "NaN or infinity"),
    ],
)
def test_damaged_folders_are_refused(pictures, kl, spoil, match):
    encode(pictures, kl)
    spoil(pictures / "latents")
    with pytest.raises(DataError, match=match):
        load(pictures)


def change(folder, **tensors):
    path = folder / "latents_00000.safetensors"
    save_file(load_file(path) | tensors, path)


def declare(folder, **facts):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | facts))


def test_a_run_on_latents_is_decoded_to_be_seen(pictures, kl):
    encode(pictures, kl, "--flip")
    size = ["--model=SiT-P/2", "--hidden-size=8", "--num-heads=2", "--depth=3", "--batch-size=4", "--steps=2"]
    argv = [
        f"--data={pictures / 'latents'}",
        f"--out={pictures / 'run'}",
        "--flip",
        "--no-tensorboard",
        "--solver=euler",
    ]
    assert (
        cli.main(["train", *argv, *size, "--solver=euler", "--sampling-steps=2", "--sample-every=2", "--device=cpu"])
        == 0
    )
    (picture,) = (pictures / "run" / "samples").glob("*.png")
    assert Image.open(picture).mode == "RGB"
    facts = json.loads((pictures / "run/checkpoints/step_00000002/state.json").read_text())["data"]["modality"]
    assert facts["autoencoder"] == str(kl)
    assert facts["std"] == [2.0] * 4


def test_latents_without_their_autoencoder_are_drawn_as_they_are(tmp_path):
    modality = Latents(autoencoder="nobody/nothing")
    for shape in ((2, 4, 8, 8), (2, 3, 12), (2, 4, 3, 8, 8)):
        (path,) = modality.overview(torch.randn(shape), tmp_path / "x", columns=2)
        assert path.is_file()
    assert modality.save(torch.randn(4, 8, 8), tmp_path / "one").suffix == ".npy"


@pytest.mark.parametrize(
    ("name", "installed", "why"), [("", True, "not known"), ("no/thing", True, "no folder"), ("", False, "not known")]
)
def test_what_is_drawn_of_latents_is_told_once(name, installed, why, tmp_path, monkeypatch, caplog):
    latents._say_what_is_drawn.cache_clear()
    monkeypatch.setattr(latents, "can_decode", lambda: installed)
    for _ in range(2):
        Latents(autoencoder=name).overview(torch.randn(2, 4, 8, 8), tmp_path / "x", columns=2)
    (message,) = caplog.messages
    assert why in message
    assert "--vae" in message


def test_latents_are_told_where_diffusers_is_missing(kl, tmp_path, monkeypatch, caplog):
    latents._say_what_is_drawn.cache_clear()
    monkeypatch.setattr(latents, "can_decode", lambda: False)
    Latents(autoencoder=str(kl)).overview(torch.randn(1, 4, 8, 8), tmp_path / "x", columns=1)
    assert "diffusers is not installed" in caplog.text


def test_latents_of_a_lone_file_are_decoded_by_the_vae_that_is_named(tmp_path, kl, caplog):
    """Its normalisation is taken to be that of the autoencoder."""
    raw = torch.randn(2, 4, 8, 8)
    modality, decoded = Latents().decoded_by(str(kl)).decoded((raw - 0.25) * 0.5)
    assert modality.kind == "images"
    torch.testing.assert_close(decoded, Autoencoder(str(kl), CPU).decode(raw))
    model = SiT(8, 2, 4, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    argv = ["sample", str(tmp_path / "model.safetensors"), "--num-heads=2", "--solver=euler", "--sampling-steps=2"]
    assert cli.main([*argv, "--per-class=2", "--device=cpu", f"--vae={kl}"]) == 0
    with Image.open(tmp_path / "model.png") as picture:
        assert (picture.mode, picture.size[1] > picture.size[0]) == ("RGB", True)
    assert not caplog.messages
    with pytest.raises(ConfigError, match="cannot load the autoencoder"):
        Latents().decoded_by(str(tmp_path))


def test_sounds_become_latents_and_sounds_again(tmp_path, oobleck, capsys):
    (tmp_path / "data").mkdir()
    for i, seconds in enumerate((0.02, 0.01)):
        soundfile.write(
            tmp_path / "data" / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, int(8000 * seconds)), 8000
        )
    assert encode(tmp_path, oobleck) == 1
    assert "holds mel" in capsys.readouterr().err
    assert encode(tmp_path, oobleck, "--sound=waveform") == 0
    data = load(tmp_path)
    assert data.spec.shape == (2, 20)
    assert data.parts["lengths"].tolist() == [20, 10]
    batch = next(data.batches(2, seed=0))
    assert not batch.samples[batch.condition.lengths == 10][..., 10:].any()
    picture, sound = data.modality.overview(batch.samples, tmp_path / "s", columns=2, lengths=batch.condition.lengths)
    assert picture.is_file()
    heard, rate = soundfile.read(sound)
    assert rate == 8000
    assert len(heard) == 160 + 80 + 2 * 2000


def test_films_become_latents_and_films_again(tmp_path, wan, monkeypatch):
    films = np.random.default_rng(0).integers(0, 256, (3, 5, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "films.npz", videos=films)
    argv = [f"--data={tmp_path / 'films.npz'}", "--frames=5", "--video-fps=12.5"]
    assert encode(tmp_path, wan, *argv) == 0
    data = load(tmp_path, latent_sample="mean")
    assert data.spec.shape == (4, 2, 4, 4)
    assert data.modality.fps == 12.5
    samples = data.take(torch.arange(3)).samples
    loads = []
    real = diffusers.AutoencoderKLWan.from_pretrained
    monkeypatch.setattr(diffusers.AutoencoderKLWan, "from_pretrained", lambda *a, **k: loads.append(a) or real(*a, **k))
    picture, film = data.modality.overview(samples, tmp_path / "s", columns=2)
    assert Image.open(picture).mode == "RGB"
    with Image.open(film) as shown:
        assert (shown.n_frames, shown.info["duration"]) == (5, 80)
    path = data.modality.save(samples[0], tmp_path / "one")
    assert len(loads) == 1
    modality, values = data.modality.decoded(samples[:1])
    with Image.open(path) as shown:
        assert (shown.n_frames, shown.size) == (5, (16, 16))
        first = torch.from_numpy(np.array(shown.convert("RGB"))).permute(2, 0, 1)
    assert (modality.kind, modality.fps) == ("video", 12.5)
    assert (unit_to_pixels(values[0, :, 0]).int() - first.int()).abs().float().mean() < 8  # GIF has 256 colours
    other = load(tmp_path, latent_sample="mean", video=VideoConfig(video_format="mp4"))
    assert other.modality.save(samples[0], tmp_path / "two").suffix == ".mp4"


def test_frames_that_an_autoencoder_would_lose_stop_it(tmp_path, wan, capsys):
    np.savez(tmp_path / "films.npz", videos=np.zeros((2, 8, 16, 16, 3), np.uint8))
    assert encode(tmp_path, wan, f"--data={tmp_path / 'films.npz'}", "--frames=8") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "keeps 5 x 16 x 16 of samples of 8 x 16 x 16, and loses the rest; give --frames 5" in said


def test_folders_from_before_films_had_a_rate_are_read(pictures, kl):
    encode(pictures, kl)
    path = pictures / "latents" / "index.json"
    index = json.loads(path.read_bytes())
    del index["fps"]
    path.write_text(json.dumps(index))
    assert load(pictures).modality.fps == 10
    assert encode(pictures, kl) == 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda folder: str(folder / "none"), "cannot load the autoencoder"),
        (lambda folder: wrong_class(folder), r"is a UNet2DModel; expected one of AutoencoderKL"),
    ],
)
def test_autoencoders_that_cannot_be_used_are_named(tmp_path, make, match):
    with pytest.raises(ConfigError, match=match):
        Autoencoder(make(tmp_path), CPU)


def wrong_class(folder):
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    return str(folder)


def test_samples_that_do_not_fit_are_named(kl):
    with pytest.raises(ConfigError, match=r"cannot take \(5, 16, 16\)"):
        Autoencoder(str(kl), CPU).encode(torch.randn(1, 5, 16, 16))
