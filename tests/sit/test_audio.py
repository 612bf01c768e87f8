"""Sounds: files of every kind to samples, and samples to sounds."""

import dataclasses
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layersync_kernels.errors import ConfigError, DataError
from layersync_kernels.sit.config.audio import AudioConfig
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.data import audio
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.modality.audio import Mel, Waveform, resampled
from layersync_kernels.sit.modality.registry import build_modality, modality_facts
from layersync_kernels.sit.training.loop import Trainer

from .tiny import tiny_config

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("librosa")

RATE = 8000
SMALL = {"mel_bins": 20, "window_ms": 32.0, "hop_ms": 8.0}


def tone(hertz, seconds=0.3, rate=RATE):
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def pitch(sound, rate=RATE):
    """The loudest frequency."""
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 8 * rate))
    return np.argmax(spectrum) / 8


@pytest.fixture
def folder(tmp_path):
    """Two classes: 500 Hz in 0.3 s and 1,200 Hz in 0.2 s."""
    for name, hertz, seconds in (("low", 500, 0.3), ("high", 1200, 0.2)):
        (tmp_path / name).mkdir()
        for i in range(2):
            soundfile.write(tmp_path / name / f"{i}.wav", tone(hertz, seconds), RATE)
    return tmp_path


def load(folder, *, limit=4.0, **options):
    return load_data(DataConfig(data=str(folder), audio=AudioConfig(**(SMALL | options)), memory_limit_gb=limit))


# Folders


def test_folder_gives_classes_lengths_and_normalised_bands(folder):
    data = load(folder)
    assert data.class_names == ["high", "low"]
    assert data.spec.shape == (20, 38)  # a frame for each 8 ms of 0.3 s that has begun
    assert data.spec.variable
    assert data.lengths.tolist() == [25, 25, 38, 38]
    there = torch.cat(
        [sample[:, :length] for sample, length in zip(data.samples, data.lengths.tolist(), strict=True)], 1
    )
    torch.testing.assert_close(there.mean(1), torch.zeros(20), atol=1e-4, rtol=0)
    assert not data.samples[0, :, 25:].any()


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_every_format_is_read(tmp_path, kind):
    soundfile.write(tmp_path / f"a.{kind}", tone(600, 0.5, 16000), 16000)
    data = load(tmp_path, sound="waveform")
    assert data.modality.sample_rate == 16000
    (sound,) = data.modality.sounds(data.samples)
    assert pitch(sound, 16000) == pytest.approx(600, abs=3)


def test_other_rates_are_resampled_and_channels_mixed_down(folder, caplog):
    caplog.set_level("INFO")
    stereo = np.stack([tone(700, 0.3, 22050), 0 * tone(700, 0.3, 22050)], 1)
    soundfile.write(folder / "low" / "other.wav", stereo, 22050)
    data = load(folder, sound="waveform", sample_rate=RATE)
    assert "1 of 5 sounds have several channels and were mixed down" in caplog.text
    sound = data.modality.sounds(data.samples, data.lengths)[-1]
    assert len(sound) == 0.3 * RATE
    assert pitch(sound) == pytest.approx(700, abs=3)
    assert np.abs(sound).max() == pytest.approx(0.2, abs=0.02)


def test_clips_are_cut_one_after_the_other(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.concatenate([tone(400, 0.5), tone(900, 0.5), tone(1500, 0.25)]), RATE)
    first = load(tmp_path, sound="waveform", clip_seconds=0.5)
    assert (len(first), first.spec.variable, first.lengths) == (1, False, None)
    whole = load(tmp_path, sound="waveform", clip_seconds=0.5, clips_per_sound=0)
    sounds = whole.modality.sounds(whole.samples, whole.lengths)
    assert [len(sound) for sound in sounds] == [4000, 4000, 2000]
    assert [round(pitch(sound), -1) for sound in sounds] == [400, 900, 1500]
    equal = load(tmp_path, sound="waveform", clip_seconds=0.5, clips_per_sound=0, fixed_length=True)
    assert not equal.spec.variable
    assert equal.samples.shape == (3, 1, 4000)


# What is broken


def test_broken_sounds_are_named_skipped_and_counted(folder, caplog):
    (folder / "low" / "empty.wav").write_bytes(b"")
    (folder / "low" / "text.wav").write_text("no sound")
    soundfile.write(folder / "low" / "nothing.wav", tone(500, 0), RATE)
    soundfile.write(folder / "low" / "nan.wav", np.full(800, np.nan, np.float32), RATE, subtype="FLOAT")
    data = load(folder)
    assert len(data) == 4
    names = sorted(name.rpartition("/")[2] for name in data.broken)
    assert names == ["empty.wav", "nan.wav", "nothing.wav", "text.wav"]
    assert "NaN" in next(reason for name, reason in data.broken.items() if "nan.wav" in name)
    assert "4 of 8 sound files are broken" in caplog.text


def test_nothing_but_broken_sounds_stops(tmp_path):
    (tmp_path / "a.wav").write_text("no sound")
    with pytest.raises(DataError, match=r"none of the 1 sound files can be read .*a\.wav"):
        load(tmp_path)


def test_sounds_beyond_the_memory_limit_stop(folder):
    with pytest.raises(DataError, match=r"sounds up to .*--memory-limit-gb .*--clip-seconds"):
        load(folder, limit=1e-5)  # one file fits, all do not
    with pytest.raises(DataError, match=r"clips of . sounds.*--memory-limit-gb .*--clip-seconds"):
        load(folder, limit=5e-5, hop_ms=1.0)  # all sounds fit, the spectrograms do not


def test_no_more_of_a_file_is_read_than_its_clips_take(tmp_path):
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", np.concatenate([tone(500, 0.1), tone(900, 5)]), RATE)
    few = {"sound": "waveform", "clip_seconds": 0.1, "limit": 100 / 2**20}  # 100 kB; a file takes 160
    data = load(tmp_path, sample_rate=RATE // 2, **few)
    assert data.samples.shape == (4, 1, 400)
    assert pitch(data.samples[0, 0].numpy(), RATE // 2) == pytest.approx(500, abs=6)
    assert data.samples[0, 0, -10:].abs().max() > 0.5  # to the end of the clip
    with pytest.raises(DataError, match=r"0\.wav, 40800 samples .*--memory-limit-gb"):
        load(tmp_path, clips_per_sound=0, **few)


def test_header_of_any_size_takes_no_memory(folder):
    """A flac that says it holds 2**36 samples, and a wav that says it has one a second."""
    soundfile.write(folder / "low" / "long.flac", tone(500), RATE)
    damaged = bytearray((folder / "low" / "long.flac").read_bytes())
    damaged[21] |= 15
    damaged[22:26] = b"\xff" * 4
    (folder / "low" / "long.flac").write_bytes(damaged)
    data = load(folder)
    assert [name.rpartition("/")[2] for name in data.broken] == ["long.flac"]
    (folder / "low" / "long.flac").unlink()
    damaged = bytearray((folder / "low" / "0.wav").read_bytes())
    damaged[24:28] = (1).to_bytes(4, "little")
    (folder / "low" / "0.wav").write_bytes(damaged)
    with pytest.raises(DataError, match=r"0.wav at 8000 samples a second: .*--memory-limit-gb"):
        load(folder, clips_per_sound=0, sample_rate=RATE, limit=0.01)


def test_clip_shorter_than_a_patch_is_one_patch(tmp_path):
    """A model's patch reaches beyond the clip's end, which is zeros there."""
    soundfile.write(tmp_path / "a.wav", tone(500, 0.01), RATE)
    soundfile.write(tmp_path / "b.wav", tone(500, 0.0625), RATE)
    data = load(tmp_path)
    assert data.lengths.tolist() == [2, 8]
    config = tiny_config(model={"patch_size": (4,)}, data={"flip": False}, optim={"batch_size": 2})
    Trainer(config, data).advance(1)


def test_missing_package_says_how_to_install_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ConfigError, match=r"soundfile.*; pip install 'layersync_kernels\[audio\]'"):
        load(folder)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clip_seconds": 0.0}, "--clip-seconds"),
        ({"hop_ms": 99.0}, "--hop-ms 99.0: expected at most --window-ms"),
        ({"sample_rate": 0}, "--sample-rate"),
        ({"clips_per_sound": -1}, "--clips-per-sound"),
    ],
)
def test_settings_out_of_range_are_named(options, match):
    with pytest.raises(ConfigError, match=match):
        AudioConfig(**options).validate()


# Spoken digits


def digits(root):
    """A file of the layout of the digits: two speakers say each digit in takes 0 and 7."""
    sounds = [tone(200 + 100 * digit, 0.1 + 0.01 * take) for digit in range(10) for take in (0, 7)]
    np.savez(
        root / "fsdd.npz",
        x=np.concatenate([(sound * 32768).astype(np.int16) for sound in sounds]),
        n=np.array([len(sound) for sound in sounds]),
        digit=np.repeat(np.arange(10), 2).astype(np.uint8),
        take=np.tile([0, 7], 10).astype(np.uint8),
    )
    return sounds


def fsdd(root, **options):
    sizes = AudioConfig(sound="waveform", fixed_length=False)
    return load_data(DataConfig(data="fsdd", data_root=root, audio=sizes, **options))


def test_digits_have_their_classes_and_their_split(tmp_path):
    sounds = digits(tmp_path)
    train, test = fsdd(tmp_path, split="train"), fsdd(tmp_path, split="test")
    assert train.labels.tolist() == test.labels.tolist() == list(range(10))
    assert set(test.lengths.tolist()) == {800}
    np.testing.assert_allclose(train.modality.sounds(train.samples, train.lengths)[3], sounds[7], atol=1e-4)
    assert train.modality == test.modality  # normalised by the training split alone
    assert train.modality.std[0] == pytest.approx(np.concatenate(sounds[1::2]).std(), rel=1e-3)


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_digits_are_found_as_recordings_too(tmp_path, monkeypatch, by):
    place = tmp_path / "free-spoken-digit-dataset" / "recordings"
    place.mkdir(parents=True)
    for name in ("0_jackson_0", "9_nicolas_12", "x"):
        soundfile.write(place / f"{name}.wav", tone(500, 0.1), RATE)
    if by == "environment":
        monkeypatch.setenv("LAYERSYNC_DATA", str(tmp_path))
    data = fsdd(tmp_path if by == "flag" else tmp_path / "none")
    assert data.labels.tolist() == [0, 9]
    assert data.test.tolist() == [True, False]
    assert list(data.broken) == [str(place / "x.wav")]


def test_digits_that_are_missing_can_be_fetched(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"neither fsdd.npz nor free-spoken-digit-dataset/ .*--download"):
        fsdd(tmp_path)
    sound = io.BytesIO()
    soundfile.write(sound, tone(500, 0.1), RATE, format="WAV")
    with zipfile.ZipFile(tmp_path / "master.zip", "w") as archive:
        archive.writestr("repository/recordings/3_theo_9.wav", sound.getvalue())
        archive.writestr("repository/recordings/../../../evil.wav", sound.getvalue())
        archive.writestr("repository/README.md", "text")
    monkeypatch.setattr(audio, "FSDD_URL", (tmp_path / "master.zip").as_uri())
    data = fsdd(tmp_path / "data", download=True)
    assert data.labels.tolist() == [3]
    assert [path.name for path in (tmp_path / "data").rglob("*.wav")] == ["3_theo_9.wav"]
    assert not list(tmp_path.rglob("evil.wav"))
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w") as archive:
        for take in range(2):
            archive.writestr(f"repository/recordings/3_theo_{take}.wav", sound.getvalue())
    damaged = bytearray((tmp_path / "damaged.zip").read_bytes())
    damaged[damaged.rfind(b"RIFF") + 100] ^= 255  # the second one's sound
    (tmp_path / "damaged.zip").write_bytes(damaged)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("repository/README.md", "text")
    for name in ("none", "damaged", "empty"):
        monkeypatch.setattr(audio, "FSDD_URL", (tmp_path / f"{name}.zip").as_uri())
        for _ in range(2):  # nothing is left that would be taken for the whole
            with pytest.raises(DataError, match="cannot download"):
                fsdd(tmp_path / "other", download=True)


@pytest.mark.parametrize(
    "change",
    [
        {"n": np.array([5])},
        {"digit": np.full(20, 10)},
        {"x": np.zeros(3, np.int16)},
        {"n": np.full(20, 10.0)},
        {"n": np.array(20)},
        {"digit": np.full((20, 2), 1)},
        {"digit": np.full(20, "1")},
        {"x": np.zeros(0, np.int16), **dict.fromkeys(["n", "digit", "take"], np.zeros(0, np.int64))},
        {"x": np.zeros(20, np.int16), "n": np.array([2**63, 2**63 + 2, *[1] * 18], np.uint64)},  # 20 in 64 bits
    ],
)
def test_digits_that_do_not_fit_together_are_refused(tmp_path, change):
    digits(tmp_path)
    np.savez(tmp_path / "fsdd.npz", **(dict(np.load(tmp_path / "fsdd.npz")) | change))
    with pytest.raises(DataError, match="do not fit together"):
        fsdd(tmp_path)
    np.savez(tmp_path / "fsdd.npz", x=np.zeros(3, np.int16))
    with pytest.raises(DataError, match="has no"):
        fsdd(tmp_path)


# From samples to sounds


def mel(**options):
    return Mel(**({"sample_rate": RATE, "window": 512, "hop": 128, "bands": 80} | options))


def test_a_tone_survives_its_spectrogram():
    sound = mel().waveform(mel().encode(torch.from_numpy(tone(900, 0.5))))
    assert len(sound) == pytest.approx(0.5 * RATE, abs=256)
    assert pitch(sound) == pytest.approx(900, abs=25)


def test_band_of_a_spectrogram_is_where_the_tone_is():
    low, high = (mel().encode(torch.from_numpy(tone(hertz))).mean(1).argmax() for hertz in (300, 3000))
    assert low < 15
    assert high > 60
    picture = mel().picture(mel().encode(torch.from_numpy(tone(300))))
    assert picture[0, :, 5].argmax() > 60  # low frequencies are at the bottom


def test_frames_are_those_that_have_begun():
    for length, frames in ((1, 1), (128, 1), (129, 2), (4000, 32)):
        assert mel().encode(torch.randn(length)).shape == (80, frames)


@pytest.mark.parametrize("modality", [mel(mean=(1.0,) * 80, std=(2.0,) * 80), Waveform(sample_rate=RATE, std=(0.1,))])
def test_a_run_draws_pictures_and_sounds(tmp_path, modality):
    channels = 80 if isinstance(modality, Mel) else 1
    samples, lengths = torch.randn(4, channels, 40 if channels > 1 else 800), torch.tensor([8, 20, 40, 3])
    picture, joined = modality.overview(samples, tmp_path / "new" / "step_1", columns=2, lengths=lengths)
    assert Image.open(picture).size[0] > 50
    sound, rate = soundfile.read(joined)
    parts = modality.sounds(samples, lengths)
    assert rate == RATE
    assert len(sound) == sum(map(len, parts)) + 4 * round(0.25 * RATE)
    assert np.abs(sound).max() <= 1
    one, _ = soundfile.read(modality.save(samples[1, :, :20], tmp_path / "one"))
    assert len(one) == len(parts[1])
    arrays = modality.arrays(samples, lengths)
    assert arrays["lengths"].tolist() == [len(part) for part in parts]
    assert arrays["sample_rate"] == RATE
    np.testing.assert_array_equal(arrays["waveforms"][3, : len(parts[3])], parts[3])


def test_loud_sounds_are_not_clipped(tmp_path):
    modality = Waveform(sample_rate=RATE)
    sound, _ = soundfile.read(modality.save(5 * torch.from_numpy(tone(500))[None], tmp_path / "loud"))
    assert np.abs(sound).max() == pytest.approx(0.99, abs=1e-3)
    assert pitch(sound) == pytest.approx(500, abs=3)
    spectrum = np.abs(np.fft.rfft(sound))
    assert np.sort(spectrum)[-20:].sum() > 0.8 * spectrum.sum()  # no overtones


@pytest.mark.parametrize("modality", [mel(mean=(0.5,) * 80), Waveform(sample_rate=44100)])
def test_modality_is_the_same_after_json(modality):
    assert build_modality(json.loads(json.dumps(modality_facts(modality)))) == modality


@pytest.mark.parametrize("modality", [mel(), Waveform(sample_rate=RATE)])
def test_samples_that_are_not_finite_are_silent(tmp_path, modality):
    """A run that diverges still draws."""
    samples = torch.full((2, modality.channels, 600), float("nan"))
    samples[1] = float("inf")
    _, joined = modality.overview(samples, tmp_path / "step_1", columns=2)
    assert np.abs(soundfile.read(joined)[0]).max() < 1e-3
    assert np.abs(modality.arrays(samples)["waveforms"]).max() < 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"sample_rate": 0},
        {"hop": 0},
        {"window": 100},
        {"bands": 0},
        {"window": 2**34},
        {"bands": 2**34},
        {"mean": (0.0,) * 3},
        {"mean": (float("nan"),) * 80},
        {"std": (0.0,) * 80},
    ],
)
def test_modality_out_of_range_is_refused(change):
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(mel(), **change)


def test_a_sound_at_its_own_rate_is_left_alone():
    sound = tone(500)
    assert resampled(sound, RATE, RATE) is sound


@pytest.mark.slow
def test_real_music_is_read_comes_back_and_is_learnt(tmp_path):
    """Debian's package singularity-music: stereo ogg of minutes. LAYERSYNC_MUSIC names another folder."""
    music = Path(os.environ.get("LAYERSYNC_MUSIC", "/usr/share/games/singularity/music"))
    files = sorted(music.glob("*.ogg"))[:6]
    if not files:
        pytest.skip(f"no music in {music}: apt install singularity-music, or LAYERSYNC_MUSIC=FOLDER")
    for file in files:
        (tmp_path / file.name).symlink_to(file)
    settings = {"mel_bins": 80, "window_ms": 64.0, "hop_ms": 16.0, "sample_rate": 16_000, "clips_per_sound": 8}
    data = load(tmp_path, **settings)
    assert len(data) == 8 * len(files)
    batch = data.take(torch.arange(0, len(data), 8))
    sounds = data.modality.sounds(batch.samples)
    assert all(np.abs(sound).max() > 1e-3 for sound in sounds)
    for sound, sample in zip(sounds, batch.samples, strict=True):
        heard = data.modality.encode(torch.from_numpy(sound))[:, : sample.shape[1]]
        wanted = data.modality.restore(sample[None])[0][:, : heard.shape[1]]
        loud = wanted > wanted.max() - 5  # 43 dB below the loudest
        assert (heard - wanted)[loud].abs().mean() < 0.2  # that of other music, or of the same backwards, is 0.5 to 1
    config = tiny_config(
        model={"patch_size": 1, "hidden_size": 64, "num_heads": 4},
        data={"flip": False},
        optim={"batch_size": 8, "steps": 60, "lr": 3e-3},
    )
    trainer = Trainer(config, data)
    losses = []
    for steps in (20, 60):
        trainer.advance(steps)
        losses.append(trainer.meter.read()["loss"])
    assert losses[1] < 0.9 * losses[0]
