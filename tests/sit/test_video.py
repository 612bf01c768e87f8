"""Video: a real file of each format, sets that are made here, films out of samples."""

import dataclasses
import itertools
import json
import logging
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from layersync_kernels.errors import ConfigError, DataError
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.config.io import save_config
from layersync_kernels.sit.config.run import CONFIG
from layersync_kernels.sit.config.video import VideoConfig
from layersync_kernels.sit.data import video_bodies
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.data.streaming import StreamingSet
from layersync_kernels.sit.modality.registry import build_modality, modality_facts
from layersync_kernels.sit.modality.video import Video, contact_sheet
from layersync_kernels.sit.models.registry import build_model
from layersync_kernels.sit.presets.video import PRESETS
from layersync_kernels.sit.sampling.load import load_trained
from layersync_kernels.sit.spec import SampleSpec
from layersync_kernels.sit.training.loop import Trainer

av = pytest.importorskip("av")

CODECS = {
    "mp4": ("libx264", "yuv420p"),
    "mov": ("libx264", "yuv420p"),
    "avi": ("mpeg4", "yuv420p"),
    "mkv": ("libx264", "yuv420p"),
    "webm": ("libvpx-vp9", "yuv420p"),
    "gif": ("gif", "rgb8"),
}
QUALITY = {"mpeg4": {"g": "8", "qmin": "1", "qmax": "2"}, "gif": {}}


def config(path, *, limit=4.0, channels=1, **video):
    video = {"frames": 4, "video_size": (16, 16), **video}
    return DataConfig(data=str(path), channels=channels, workers=1, memory_limit_gb=limit, video=VideoConfig(**video))


def ramp(frames=24, size=(32, 48)):
    """A film (T, H, W, 3) whose frame t is grey 8·t."""
    return np.broadcast_to(8 * np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, *size, 3))


def write(path, film, fps=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    codec, pixels = CODECS[path.suffix[1:]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *film.shape[1:3], pixels
        stream.options = QUALITY.get(codec, {"g": "8", "crf": "5"})
        for picture in film:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(data):
    """Which frames of `ramp` the clips of a set are."""
    pixels = (data.take(torch.arange(len(data))).samples + 1) * 127.5
    return (pixels.mean((1, 3, 4)) / 8).round().int().tolist()


@pytest.mark.parametrize("limit", [4.0, 0.0])
@pytest.mark.parametrize("suffix", CODECS)
def test_a_folder_of_each_format(tmp_path, suffix, limit):
    write(tmp_path / "up" / f"a.{suffix}", ramp())
    write(tmp_path / "down" / f"b.{suffix}", ramp()[::-1])
    data = load_data(config(tmp_path, limit=limit, frame_stride=2))
    assert isinstance(data, StreamingSet) == (limit == 0)  # those seek, as the clips of the others are read in one pass
    assert (data.spec.shape, data.class_names, data.modality) == ((1, 4, 16, 16), ["down", "up"], Video(fps=5.0))
    up = [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20, 22]]
    assert numbers(data) == [[23 - n for n in clip] for clip in up] + up
    assert data.take(torch.tensor([5, 0])).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("video", "clips"),
    [
        ({"clips_per_file": 1}, [[10, 11, 12, 13]]),
        ({"clips_per_file": 3}, [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]]),
        ({"frames": 12}, [list(range(12)), list(range(12, 24))]),
        ({"video_fps": 5.0}, [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20, 22]]),
        ({"video_fps": 20.0, "clips_per_file": 1}, [[11, 11, 12, 12]]),
        ({"frames": 24}, [list(range(24))]),
    ],
)
def test_windows_are_the_same_always(tmp_path, video, clips):
    write(tmp_path / "a.mkv", ramp())
    assert numbers(load_data(config(tmp_path, **video))) == clips


def test_the_rate_of_a_set_is_that_of_its_samples(tmp_path):
    write(tmp_path / "a.mp4", ramp(), fps=24)
    assert load_data(config(tmp_path)).modality.fps == 24
    assert load_data(config(tmp_path, frame_stride=3)).modality.fps == 8
    assert load_data(config(tmp_path, video_fps=12.0)).modality.fps == 12


def test_frames_are_cut_to_the_shape_that_is_asked_for(tmp_path):
    film = np.zeros((4, 32, 64, 3), np.uint8)
    film[:, :, 32:] = 255
    write(tmp_path / "a.gif", film)
    wide = load_data(config(tmp_path, video_size=(8, 16), channels=3)).take(torch.tensor([0])).samples[0]
    assert wide.shape == (3, 4, 8, 16)
    assert (wide[..., :8] == -1).all()
    assert (wide[..., 8:] > 0.95).all()  # of the 256 colours that FFmpeg's encoder of GIF has, none is quite white
    tall = load_data(config(tmp_path, video_size=(16, 8))).take(torch.tensor([0])).samples[0]
    assert tall.shape == (1, 4, 16, 8)
    assert (tall[..., :4] == -1).all()
    assert load_data(config(tmp_path, video_size=None)).spec.extent == (4, 32, 64)


def test_a_film_that_changes_its_size(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuvj420p"
        for t, size in enumerate([32, 32, 64, 64]):
            codec = av.CodecContext.create("mjpeg", "w")
            codec.height, codec.width, codec.pix_fmt, codec.time_base = (
                size,
                size,
                "yuvj420p",
                Fraction(1, 10),
            )
            picture = np.full((size, size, 3), 40 * t, np.uint8)
            (packet,) = codec.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuvj420p"))
            packet.stream, packet.pts, packet.dts = stream, t, t
            container.mux(packet)
    data = load_data(config(tmp_path))
    assert numbers(data) == [[0, 5, 10, 15]]


def test_broken_films_are_named_skipped_and_counted(tmp_path, caplog):
    write(tmp_path / "good.mp4", ramp())
    write(tmp_path / "short.mp4", ramp(frames=3))
    (tmp_path / "empty.avi").write_bytes(b"")
    (tmp_path / "text.webm").write_text("no film at all")
    cut = write(tmp_path / "cut.mkv", ramp(frames=60, size=(64, 64)))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with caplog.at_level(logging.WARNING, "layersync_kernels"):
        data = load_data(config(tmp_path))
    reasons = {name.rpartition("/")[2]: reason for name, reason in data.broken.items()}
    assert {"short.mp4", "empty.avi", "text.webm", "sound.mp4"} <= reasons.keys() <= {*reasons, "cut.mkv"}
    assert "no video stream" in reasons["sound.mp4"]
    assert "3 frames" in reasons["short.mp4"]
    assert "--frames" in reasons["short.mp4"]
    assert "are broken and were skipped" in caplog.text
    assert len(data) >= 6
    (tmp_path / "good.mp4").unlink()
    cut.unlink()
    with pytest.raises(DataError, match="none of the 4 video files can be read"):
        load_data(config(tmp_path))


def test_a_stream_goes_past_a_film_that_breaks_later(tmp_path):
    write(tmp_path / "a.mkv", ramp())
    other = write(tmp_path / "b.mkv", ramp())
    data = load_data(config(tmp_path, limit=0.0))
    other.unlink()
    batch = next(data.batches(12, seed=0))
    assert batch.samples.shape == (12, 1, 4, 16, 16)
    assert [name.rpartition("/")[2] for name in data.broken] == ["b.mkv"]


def gif_header(width, height):
    """Declares one frame of that size, with hardly a byte in it."""
    size = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    frame = b"\x2c\0\0\0\0" + size + b"\0" + b"\x08" + b"\x04\x00\x01\x04\x05" + b"\0"
    return b"GIF89a" + size + b"\x80\0\0" + bytes(6) + frame * 4 + b";"


@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_huge_frames_are_refused_before_they_are_decoded(tmp_path, limit):
    (tmp_path / "bomb.gif").write_bytes(gif_header(40_000, 40_000))
    with pytest.raises(DataError, match="beyond --memory-limit-gb"):
        load_data(config(tmp_path, limit=limit))


def test_a_clip_beyond_the_memory_limit(tmp_path):
    write(tmp_path / "a.mp4", ramp())
    with pytest.raises(DataError, match="more than --memory-limit-gb"):
        load_data(config(tmp_path, limit=1e-4, video_size=(512, 512)))


def test_a_missing_package_says_what_brings_it(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", ramp())
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "pybullet", None)
    with pytest.raises(ConfigError, match=r"pip install 'layersync_kernels\[video\]'"):
        load_data(config(tmp_path))
    with pytest.raises(ConfigError, match=r"pip install 'layersync_kernels\[video\]'"):
        Video(fps=8.0, container="mp4").save(torch.zeros(1, 4, 8, 8), tmp_path / "b")
    with pytest.raises(ConfigError, match=r"pip install 'layersync_kernels\[bodies\]'"):
        load_data(dataclasses.replace(config("bodies"), data_root=tmp_path))


@pytest.mark.parametrize("key", ["videos", "images"])
def test_films_in_an_array(tmp_path, key):
    film = np.random.default_rng(0).integers(0, 256, (5, 9, 16, 24, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", **{key: film, "labels": np.arange(5) % 2})
    data = load_data(config(tmp_path / "a.npz", channels=None, video_size=None, frame_stride=2))
    assert (data.spec.shape, data.num_classes, data.modality) == ((3, 4, 16, 24), 2, Video(fps=4.0))
    back = data.modality.arrays(data.take(torch.arange(5)).samples)["videos"]
    assert (back == film[:, 1:8:2]).all()
    grey = load_data(config(tmp_path / "a.npz", video_size=(8, 12)))
    assert grey.spec.shape == (1, 4, 8, 12)
    luma = (film[:, 2:6] @ [0.299, 0.587, 0.114]).round().reshape(5, 4, 8, 2, 12, 2).mean((3, 5)).round()
    assert np.abs(grey.samples[:, 0].numpy() - luma).max() <= 1


def test_grey_films_in_an_array(tmp_path):
    film = np.arange(2 * 4 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 4)
    np.savez(tmp_path / "a.npz", videos=film)
    data = load_data(config(tmp_path / "a.npz", channels=None, video_size=None))
    assert (data.samples[:, 0].numpy() == film).all()


@pytest.mark.parametrize(
    ("film", "message"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), "3 frames; --frames 4"),
        (np.zeros((2, 4, 8, 8, 2), np.uint8), "C being 1 or 3"),
        (np.zeros((0, 4, 8, 8), np.uint8), "N > 0"),
        (np.full((2, 4, 8, 8), np.nan, np.float32), "range over"),
        (np.zeros((2, 4, 8, 8), np.int64), "expected uint8"),
        (np.array([[None]]), "never unpickled"),
    ],
)
def test_arrays_that_are_no_films(tmp_path, film, message):
    np.savez(tmp_path / "a.npz", videos=film)
    with pytest.raises(DataError, match=message):
        load_data(config(tmp_path / "a.npz"))


def digits(**video):
    return load_data(config("moving-mnist", **{"made_clips": 200, "frames": 8, "video_size": (24, 32), **video}))


def test_moving_digits_move_and_bounce():
    data = digits()
    assert (data.spec.shape, len(data), data.num_classes) == ((1, 8, 24, 32), 200, 10)
    assert (data.samples == digits().samples).all()
    light = data.samples[:, 0].double()
    mass = light.sum((2, 3))
    assert (mass / mass[:, :1] - 1).abs().max() < 0.02  # no digit ever leaves the picture
    y, x = (light.sum(3) @ torch.arange(24.0).double()) / mass, (light.sum(2) @ torch.arange(32.0).double()) / mass
    speed = torch.stack([y.diff(), x.diff()]).norm(dim=0)
    assert 0.5 < speed.median() < 1.5
    assert speed.max() < 0.06 * 24 + 1.5  # half a pixel of rounding at each end of a step
    turns = ((y.diff()[:, :-1] * y.diff()[:, 1:]) < -0.1).any(1)
    assert 0.2 < turns.double().mean() < 0.9


def test_digits_of_the_test_split_are_seen_nowhere_else():
    def seen(split):
        data = load_data(
            dataclasses.replace(config("moving-mnist", made_clips=3000, frames=1, video_size=(14, 14)), split=split)
        )
        return {bytes(sample.numpy()) for sample in data.samples}, len(data)

    (train, many), (test, few) = seen("train"), seen("test")
    assert (many, few) == (2700, 300)
    assert not train & test


def test_two_digits_are_a_class_of_pairs():
    data = digits(moving_digits=2, video_size=(64, 64), made_clips=40)
    assert (data.num_classes, data.class_names[0], data.class_names[-1]) == (55, "0 and 0", "9 and 9")
    assert data.labels.unique().numel() > 20
    single = digits(video_size=(64, 64), made_clips=40)
    assert data.samples.float().mean() > 1.5 * single.samples.float().mean()


def test_frames_smaller_than_a_digit():
    with pytest.raises(DataError, match="--video-size 13 32: a digit has 14 pixels"):
        digits(video_size=(13, 32))


def test_bodies_are_made_once_and_are_the_same_always(tmp_path, monkeypatch):
    pytest.importorskip("pybullet")
    settings = dataclasses.replace(
        config("bodies", channels=None, made_clips=6, frames=3, video_size=(16, 24)), data_root=tmp_path / "one"
    )
    data = load_data(settings)
    assert (data.spec.shape, data.class_names) == ((3, 3, 16, 24), list(video_bodies.CLASSES))
    again = load_data(dataclasses.replace(settings, data_root=tmp_path / "two"))
    assert (data.samples == again.samples).all()
    colourful = (data.samples.amax(1).int() - data.samples.amin(1).int() > 60).sum((1, 2, 3))
    assert (colourful > 10).all()
    assert colourful[4:].min() > colourful[:2].max()  # three bodies are more than one
    assert (data.samples[:, :, 0] != data.samples[:, :, -1]).flatten(1).any(1).all()
    monkeypatch.setitem(sys.modules, "pybullet", None)
    assert (load_data(settings).samples == data.samples).all()  # from the file
    (file,) = (tmp_path / "one").iterdir()
    np.savez(file, videos=np.zeros((6, 3, 8, 8, 3), np.uint8), labels=np.zeros(6, np.int64))
    with pytest.raises(DataError, match="delete it"):
        load_data(settings)


def test_more_made_clips_than_fit():
    for name in ("moving-mnist", "bodies"):
        with pytest.raises(DataError, match="take fewer --made-clips"):
            load_data(config(name, limit=0.1, made_clips=10**7))


def colours(count=4, frames=5):
    """Samples (N, 3, T, 8, 9) of one colour each, brighter with time."""
    palette = torch.tensor(list(itertools.product([-1.0, 0.6], repeat=3)))[1 : count + 1]
    return (palette[:, :, None, None, None] * torch.linspace(0.5, 1, frames)[None, None, :, None, None]).expand(
        -1, -1, -1, 8, 9
    )


def test_an_overview_is_a_picture_and_an_animation(tmp_path):
    sheet, animation = Video(fps=8.0).overview(colours(), tmp_path / "new" / "step", columns=2)
    assert (sheet.name, animation.name) == ("step.png", "step.gif")
    with Image.open(animation) as film:
        assert (film.n_frames, film.info["duration"], film.info["loop"]) == (5, 120, 0)
        assert film.size == (2 * (6 * 9 + 4) + 4, 2 * (6 * 8 + 4) + 4)
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape[2] == 3
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) >= 4 * 5


def test_a_contact_sheet_keeps_rows_and_order():
    films = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1, 1).expand(-1, 1, 20, 4, 4) * 20
    films = films + torch.arange(20, dtype=torch.uint8).view(1, 1, 20, 1, 1)
    sheet = contact_sheet(films, columns=3)
    strips = sheet[0, 4::8, 5:]
    shown = strips[:, [*range(0, 40, 5)]].tolist()
    assert shown == [[20 * n + m for m in (0, 3, 5, 8, 11, 14, 16, 19)] for n in range(6)]


def test_single_films(tmp_path):
    grey = torch.linspace(-1, 1, 6).view(1, 6, 1, 1).expand(1, 6, 8, 8)
    path = Video(fps=10.0).save(grey, tmp_path / "a")
    with Image.open(path) as film:
        levels = []
        for frame in range(film.n_frames):
            film.seek(frame)
            levels.append(int(np.asarray(film.convert("L"))[0, 0]))
    assert levels == [0, 51, 102, 153, 204, 255]
    odd = colours(1)[0]
    path = Video(fps=10.0, container="mp4").save(odd, tmp_path / "b")
    (tmp_path / "mp4").mkdir()
    path.rename(tmp_path / "mp4" / "b.mp4")
    data = load_data(config(tmp_path / "mp4", channels=3, frames=5, video_size=None))
    assert (data.spec.shape, data.modality.fps) == ((3, 5, 8, 10), 10.0)
    back = data.take(torch.tensor([0])).samples[0]
    assert (back[..., :9] - odd).abs().mean() < 0.05
    assert (back[..., 9] - odd[..., 8]).abs().mean() < 0.05


def test_a_modality_comes_back_from_its_facts():
    video = Video(fps=12.5, container="mp4")
    assert build_modality(json.loads(json.dumps(modality_facts(video)))) == video
    with pytest.raises(ValueError, match="fps is 0"):
        build_modality({"kind": "video", "fps": 0.0})


@pytest.mark.parametrize(
    ("video", "flag"),
    [({"frames": 0}, "--frames 0"), ({"video_size": (0, 8)}, "--video-size 0"), ({"video_fps": 0.0}, "--video-fps")],
)
def test_settings_out_of_range(video, flag):
    with pytest.raises(ConfigError, match=flag):
        VideoConfig(**video).validate()


def tiny(preset):
    """The same in milliseconds."""
    video = dataclasses.replace(preset.data.video, made_clips=40)
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, video=video),
        model=dataclasses.replace(preset.model, hidden_size=16, num_heads=2),
        optim=dataclasses.replace(preset.optim, steps=2, batch_size=4, warmup_steps=0),
        sampling=dataclasses.replace(preset.sampling, solver="euler", sampling_steps=2),
        log=dataclasses.replace(preset.log, grid_columns=2, log_every=2),
    )


def test_the_preset_trains_and_draws(tmp_path):
    settings = tiny(PRESETS["video"])
    trainer = Trainer(settings, run_dir=tmp_path)
    trainer.advance(2)
    assert trainer.meter.read()["cosine/2:4"] <= 1
    assert trainer.draw_samples() == tmp_path / "samples" / "step_00000002.png"
    assert (tmp_path / "samples" / "step_00000002.gif").is_file()
    trainer.save()
    save_config(settings, tmp_path / CONFIG)
    assert load_trained(tmp_path).modality == Video(fps=8.0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_together(name):
    preset = PRESETS[name]
    preset.validate()
    video = preset.data.video
    with torch.device("meta"):
        spec = SampleSpec(preset.data.channels or 1, (video.frames, *video.video_size))
        model = build_model(preset.model, spec, 10)
    student, teacher = map(int, preset.layersync.layersync[0].split(":"))
    assert student < teacher <= len(model.blocks)
