"""CLAP as a network that hears sounds, with random weights: its published ones are a download."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from layersync_kernels.errors import CheckpointError, ConfigError
from layersync_kernels.sit.evaluation.registry import load_network

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small CLAP: its window is a fifth of a second."""
    path = tmp_path_factory.mktemp("clap")
    config = transformers.ClapAudioConfig(
        patch_embeds_hidden_size=16, depths=[1, 1], num_attention_heads=[2, 4], hidden_size=32, projection_dim=12,
        num_hidden_layers=2, spec_size=64, num_mel_bins=16, window_size=4, num_classes=5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.ClapAudioModelWithProjection(config).save_pretrained(path)
    transformers.ClapFeatureExtractor(feature_size=16, sampling_rate=16_000, max_length_s=1).save_pretrained(path)
    return path


def network(folder):
    return load_network(
        "clap", "audio", CPU, splits=lambda: pytest.fail("of motion alone"), folder=folder, weights=folder
    )


def sounds(rate, *lengths):
    waves = np.random.default_rng(0).normal(0, 0.1, (len(lengths), max(lengths))).astype(np.float32)
    return {"waveforms": waves, "lengths": np.array(lengths), "sample_rate": np.array(rate)}


def test_features_are_those_of_transformers(folder):
    arrays = sounds(16_000, 9000, 16_000)
    seen = network(folder)(arrays, "real")
    extractor = transformers.ClapFeatureExtractor.from_pretrained(folder)
    model = transformers.ClapAudioModelWithProjection.from_pretrained(folder).eval()
    for row, wave, length in zip(seen.features, arrays["waveforms"], arrays["lengths"], strict=True):
        given = extractor(wave[:length], sampling_rate=16_000, return_tensors="pt", truncation="rand_trunc")
        with torch.no_grad():
            torch.testing.assert_close(row, model(input_features=given["input_features"]).audio_embeds[0])
    assert torch.equal(seen.sets["parts"], seen.features)


def test_a_longer_sound_is_the_mean_of_its_windows_whatever_is_drawn_before(folder):
    own = network(folder)
    long = sounds(16_000, 40_000)
    np.random.seed(1)
    whole = own(long, "real").features
    wave = long["waveforms"][0]
    parts = [wave[i : i + 16_000] for i in (0, 16_000, 32_000)]
    each = [
        own({"waveforms": p[None], "lengths": np.array([len(p)]), "sample_rate": np.array(16_000)}, "x") for p in parts
    ]
    torch.testing.assert_close(whole, torch.stack([seen.features for seen in each]).mean(0))


def test_sounds_of_another_rate_are_resampled(folder):
    """A slow tone is the same sound at both rates."""
    own, found = network(folder), []
    for rate in (8000, 16_000):
        wave = np.sin(2 * np.pi * 300 * np.arange(rate) / rate).astype(np.float32)[None]
        arrays = {"waveforms": wave, "lengths": np.array([rate]), "sample_rate": np.array(rate)}
        found.append(own(arrays, "real").features)
    torch.testing.assert_close(*found, atol=0.02, rtol=0)


def test_what_is_no_clap_is_told(folder, tmp_path):
    with pytest.raises(ConfigError, match="a copy of laion/clap-htsat-unfused, by --features-weights"):
        load_network("clap", "audio", CPU, splits=lambda: None, folder=tmp_path)
    with pytest.raises(CheckpointError, match="is no CLAP"):
        network(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    save_file(
        {key: own for key, own in tensors.items() if key != name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors, such as {name}"):
        network(tmp_path)
    with pytest.raises(ConfigError, match="--features vggish: no such network of audio; expected resemblyzer or clap"):
        load_network("vggish", "audio", CPU, splits=lambda: None, folder=tmp_path)
