"""Motion: loaders with a real file of each format, features and their way back, pictures."""

import dataclasses
import importlib.util
import json
import logging
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from layersync_kernels.errors import ConfigError, DataError
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.config.motion import MotionConfig
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.modality.motion import HUMANML3D_PARENTS, Motion
from layersync_kernels.sit.modality.motion_drawing import CELL, save_film
from layersync_kernels.sit.modality.motion_kinematics import forward_kinematics, heading, heading_reference, turn
from layersync_kernels.sit.modality.registry import build_modality, modality_facts

PARENTS = (-1, 0, 1, 0, 3, 0, 5)
OFFSETS = np.array(
    [[0, 0, 0], [0.2, -0.1, 0], [0, -0.8, 0.1], [-0.2, -0.1, 0], [0, -0.8, 0.1], [0, 0.5, 0], [0, 0.3, 0]]
)


def config(path, **motion):
    motion = {"motion_fps": None, **motion}
    return DataConfig(data=str(path), workers=2, motion=MotionConfig(**motion))


def walk(frames=40, seed=0, curve=0.04):
    """Exponential maps (T, J, 3) and the path (T, 3) of a body that swings its legs as it walks a curve."""
    rng = np.random.default_rng(seed)
    time = np.arange(frames)
    facing = 1.0 + seed + curve * time
    rotations = np.zeros((frames, len(PARENTS), 3))
    tilt = Rotation.from_rotvec(0.1 * np.sin(time)[:, None] * [1, 0, 0.5])
    rotations[:, 0] = (Rotation.from_rotvec(facing[:, None] * [0, 1, 0]) * tilt).as_rotvec()
    rotations[:, 1, 0] = 0.5 * np.sin(0.4 * time)
    rotations[:, 3, 0] = -0.5 * np.sin(0.4 * time)
    rotations[:, 5] = 0.05 * rng.normal(size=(frames, 3))
    steps = np.stack([0.05 * np.sin(facing), np.zeros(frames), 0.05 * np.cos(facing)], -1)
    root = np.array([3.0, 0, -2]) + steps.cumsum(0)
    root[:, 1] = 0.9 + 0.03 * np.sin(0.8 * time)
    return rotations, root


def places(frames=40, seed=0):
    rotations, root = walk(frames, seed)
    return forward_kinematics(rotations, root, PARENTS, OFFSETS)


def save_positions(path, *clips, **others):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.stack(clips) if len(clips) > 1 else clips[0]
    np.savez(path, positions=array.astype(np.float32), parents=np.array(PARENTS), **others)
    return path


def from_start(clip):
    """The same motion, beginning above the origin."""
    return clip - clip[:1, :1] * [1, 0, 1]


def same_motion(actual, expected, **tolerance):
    """Compares (T, J, 3) up to where it begins and which way it faces there."""
    a, b = from_start(np.asarray(actual, np.float64)), from_start(np.asarray(expected, np.float64))
    ground = [(clip[..., 0] + 1j * clip[..., 2])[1:] for clip in (a, b)]
    angle = np.angle((ground[0] * ground[1].conj()).sum())
    np.testing.assert_allclose(turn(a, np.full(a.shape[:2], angle)), b, **{"atol": 2e-4, "rtol": 0, **tolerance})


# Kinematics


def test_forward_kinematics_by_hand():
    rotations = np.zeros((1, 3, 3))
    rotations[0, 0] = [0, np.pi / 2, 0]  # z becomes x
    rotations[0, 1] = [np.pi / 2, 0, 0]  # y becomes z, and z is turned to x by the joint before
    found = forward_kinematics(
        rotations, np.array([[1.0, 2, 3]]), (-1, 0, 1), np.array([[9, 9, 9], [0, 0, 1], [0, 1, 0]])
    )
    np.testing.assert_allclose(found[0], [[1, 2, 3], [2, 2, 3], [3, 2, 3]], atol=1e-12)


def test_heading_follows_a_turning_body():
    clip = places()[:1].repeat(9, 0)
    angles = np.linspace(-3, 3, 9)
    reference = clip[0][:, [0, 2]] - clip[0][:1, [0, 2]]
    np.testing.assert_allclose(heading(turn(clip, angles[:, None]), reference), angles, atol=1e-9)


def test_hands_that_swing_do_not_turn_a_body():
    rng = np.random.default_rng(0)
    clip = np.zeros((200, 4, 3))
    clip[:, 1], clip[:, 2] = [0.2, -0.1, 0], [-0.2, -0.1, 0]  # hips
    clip[:, 3] = [0.3, 0.2, 0.2] + 0.25 * rng.normal(size=(200, 3))  # a hand
    assert np.std(heading(clip, heading_reference([clip]))) < 0.03


# There and back


@pytest.mark.parametrize("kind", ["positions", "rotations"])
def test_restored_motion_is_the_motion(kind, tmp_path):
    """The path of joint 0 comes back by integration, on a curve and above the ground."""
    rotations, root = walk()
    file = tmp_path / "walk.npz"
    if kind == "positions":
        save_positions(file, places())
    else:
        np.savez(file, rotations=rotations, translations=root, parents=np.array(PARENTS), offsets=OFFSETS)
    data = load_data(config(file))
    assert (data.modality.representation, len(data), data.spec.variable) == (kind, 1, True)
    batch = data.take(torch.tensor([0]))
    restored = data.modality.skeletons(batch.samples, batch.condition.lengths)[0]
    same_motion(restored, places())
    np.testing.assert_allclose(restored[0, 0], [0, places()[0, 0, 1], 0], atol=1e-5)
    moved = restored[-1, 0] - restored[0, 0]
    assert np.hypot(*moved[[0, 2]]) == pytest.approx(np.hypot(*(root[-1] - root[0])[[0, 2]]), rel=1e-4)


def test_samples_do_not_know_where_a_motion_begins_or_faces(tmp_path):
    clip = places()
    elsewhere = np.array([5.0, 0, -7]) + turn(clip, np.full(clip.shape[:2], 2.0))
    data = load_data(config(save_positions(tmp_path / "two.npz", clip, elsewhere)))
    torch.testing.assert_close(data.samples[0], data.samples[1], atol=2e-2, rtol=0)


def test_what_does_not_vary_is_left_out_and_comes_back(tmp_path):
    """Ends of limbs do not turn: their exponential maps are no channels."""
    rotations, root = walk()
    rotations[:, 2] = [0.1, 0.2, 0.3]
    np.savez(tmp_path / "a.npz", rotations=rotations, translations=root, parents=np.array(PARENTS), offsets=OFFSETS)
    data = load_data(config(tmp_path / "a.npz"))
    joints = [(feature - 4) // 3 for feature in data.modality.kept if feature >= 4]
    assert joints == [0, 0, 0, 1, 3, 5, 5, 5]  # the legs swing about one axis
    values = data.modality.restore(data.samples)[0]
    torch.testing.assert_close(values[9:12], torch.tensor([0.1, 0.2, 0.3])[:, None].expand(3, 40))


def test_channels_are_normalised_by_the_training_split_alone(tmp_path):
    clips = [places(seed=seed) for seed in range(10)]
    held = load_data(config(save_positions(tmp_path / "a.npz", *clips))).test.nonzero().item()
    clips[held] = clips[held] * 5
    data = load_data(config(save_positions(tmp_path / "b.npz", *clips)))
    training = data.samples[~data.test]
    torch.testing.assert_close(training.mean((0, 2)), torch.zeros(data.spec.channels), atol=1e-4, rtol=0)
    assert training.std() < 1.1 < data.samples[held].abs().max() / 3


def test_facts_go_through_json(tmp_path):
    modality = load_data(config(save_positions(tmp_path / "a.npz", places()))).modality
    assert build_modality(json.loads(json.dumps(modality_facts(modality)))) == modality


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parents": (-1, 2, 0, 0, 0, 0, 0)}, "expected -1, then for each joint a number below its own"),
        ({"fps": 0.0}, "expected a number of frames a second"),
        ({"kept": (999,), "mean": (0.0,), "std": (1.0,)}, r"features \(999,\) are kept, of 22"),
        ({"kept": ()}, "0 features of 22 are kept"),
        ({"representation": "rotations"}, "0 offsets for 7 parents"),
    ],
)
def test_facts_that_cannot_be_are_refused(tmp_path, change, message):
    modality = load_data(config(save_positions(tmp_path / "a.npz", places()))).modality
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(modality, **change)


# Windows, rates, splits


def test_long_recordings_become_windows_and_the_end_keeps_its_length(tmp_path):
    data = load_data(config(save_positions(tmp_path / "a.npz", places(90)), motion_frames=32, motion_stride=20))
    assert data.lengths.tolist() == [32, 32, 32, 30]
    assert data.spec.extent == (32,)
    assert not data.samples[3, :, 30:].any()
    for number, start in enumerate((0, 20, 40, 60)):
        clip = data.modality.skeletons(data.samples[number : number + 1], data.lengths[number : number + 1])[0]
        same_motion(clip, places(90)[start : start + 32])


@pytest.mark.parametrize(("fps", "expected"), [(120, 11), (60, 21), (30, 41), (20, 41), (50, 25)])
def test_frames_are_left_out_down_to_the_rate_that_is_asked_for(tmp_path, fps, expected):
    """41 frames last as long at 30 a second; what is slower stays as it is."""
    file = save_positions(tmp_path / "a.npz", places(41), fps=fps)
    data = load_data(config(file, motion_fps=30.0))
    assert (data.lengths.item(), data.modality.fps) == (expected, min(fps, 30))
    clip = data.modality.skeletons(data.samples)[0]
    same_motion(clip, places(41)[(np.arange(expected) * max(fps / 30, 1)).round().astype(int)])


def test_windows_of_a_recording_are_on_one_side_of_the_split(tmp_path):
    file = save_positions(tmp_path / "a.npz", *(places(seed=seed) for seed in range(20)))
    data = load_data(config(file, motion_frames=16))
    test = data.test.view(20, -1)
    assert (test.any(1) == test.all(1)).all()
    assert test.any(1).sum() == 2
    split = dataclasses.replace(config(file, motion_frames=16), split="test")
    assert len(load_data(split)) == data.test.sum()


def test_lengths_labels_and_classes_of_a_file(tmp_path):
    file = save_positions(
        tmp_path / "a.npz", places(20), places(20, 1), labels=np.array([2, 0]), lengths=np.array([20, 7])
    )
    data = load_data(config(file))
    assert (data.num_classes, data.labels.tolist(), data.lengths.tolist()) == (3, [2, 0], [20, 7])
    assert data.typical_lengths() == ((7,) * 8, (), (20,) * 8)
    assert not data.samples[1, :, 7:].any()


# Folders of .npz files


def test_folders_are_classes_and_a_broken_file_is_named(tmp_path, caplog):
    save_positions(tmp_path / "jump" / "a.npz", places(12))
    save_positions(tmp_path / "walk" / "b.npz", places(20, 1))
    (tmp_path / "walk" / "c.npz").write_bytes(b"PK\x03\x04 not much of an archive")
    with caplog.at_level(logging.WARNING):
        data = load_data(config(tmp_path))
    assert (data.class_names, data.labels.tolist(), data.lengths.tolist()) == (["jump", "walk"], [0, 1], [12, 20])
    assert list(data.broken) == [str(tmp_path / "walk" / "c.npz")]
    assert "1 of 3 motion files are broken" in caplog.text


def test_another_skeleton_names_both_files(tmp_path):
    save_positions(tmp_path / "a.npz", places())
    np.savez(tmp_path / "b.npz", positions=places()[:, :5], parents=np.array(PARENTS[:5]))
    with pytest.raises(DataError, match=r"b\.npz is of another skeleton than .*a\.npz: 5 joints .*, not 7 joints"):
        load_data(config(tmp_path))


def test_all_unreadable_stops(tmp_path):
    for name, length in (("a.npz", 0), ("b.npz", 99)):
        save_positions(tmp_path / name, places(), lengths=np.array([length]))
    with pytest.raises(DataError, match=r"none of the 2 motion files can be read \(.*a\.npz: length 0 of recording 0"):
        load_data(config(tmp_path))


# What a file must not hold


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"positions": np.full((4, 7, 3), np.nan, np.float32)}, "recording 0: frame 0 is not finite"),
        ({"positions": np.zeros((4, 2, 2), np.float32)}, r"positions are float32 \(4, 2, 2\); expected floats"),
        ({"positions": np.zeros((4, 2, 3), np.int64)}, r"positions are int64"),
        ({"positions": np.zeros((0, 2, 3), np.float32)}, "expected at least one joint in one frame"),
        ({"lengths": np.array([0])}, "length 0 of recording 0; expected 1 to 40 frames"),
        ({"lengths": np.array([1.5])}, r"lengths are float64 \(1,\); expected integers"),
        ({"labels": np.array([-1])}, "labels go down to -1"),
        ({"parents": np.array([0, 1])}, r"parents are int64 \(2,\); expected numbers \(7,\)"),
        ({"parents": np.array([-1, 3, 0, 0, 0, 0, 0])}, "a number below its own"),
        ({"fps": np.array(0)}, "0 frames a second; expected more than 0"),
        ({"fps": np.array("fast")}, "fps is <U4"),
        ({"captions": np.array([1])}, r"captions are int64 \(1,\); expected strings"),
        ({"positions": np.array([[object()]])}, "Python objects, which are never unpickled"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, arrays, message):
    usual = {"positions": places().astype(np.float32), "parents": np.array(PARENTS)}
    np.savez(tmp_path / "a.npz", **(usual | arrays))
    with pytest.raises(DataError, match=message) as caught:
        load_data(config(tmp_path / "a.npz"))
    assert str(caught.value).startswith(str(tmp_path / "a.npz"))


def test_rotations_without_a_skeleton_are_refused(tmp_path):
    rotations, _ = walk()
    np.savez(tmp_path / "a.npz", rotations=rotations, parents=np.array(PARENTS))
    with pytest.raises(DataError, match=r"rotations need offsets \(7, 3\)"):
        load_data(config(tmp_path / "a.npz"))


def test_more_than_memory_is_refused_before_it_is_taken(tmp_path):
    file = save_positions(tmp_path / "a.npz", places())
    with pytest.raises(DataError, match="more than --memory-limit-gb 1e-06"):
        load_data(dataclasses.replace(config(file), memory_limit_gb=1e-6))


@pytest.mark.parametrize("frames", [1, 2])
def test_a_clip_of_a_frame_or_two(tmp_path, frames):
    """Shorter than any patch: it keeps its length, and stands where it stood."""
    file = save_positions(tmp_path / "a.npz", places(), places(seed=1), lengths=np.array([40, frames]))
    data = load_data(config(file))
    clip = data.modality.skeletons(data.samples[1:], data.lengths[1:])[0]
    np.testing.assert_allclose(clip[..., 1], places(seed=1)[:frames, :, 1], atol=1e-5)


@pytest.mark.parametrize(("flag", "value"), [("motion_frames", 0), ("motion_stride", 0), ("motion_fps", 0.0)])
def test_settings_out_of_range(flag, value):
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} {value}"):
        config("unused", **{flag: value}).validate()


# BVH


needs_bvhio = pytest.mark.skipif(not importlib.util.find_spec("bvhio"), reason="needs bvhio")
BVH = """HIERARCHY
ROOT Hips
{{
  OFFSET 1.0 2.0 3.0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  JOINT Leg
  {{
    OFFSET 0.0 -4.0 0.0
    CHANNELS 3 Zrotation Xrotation Yrotation
    End Site
    {{
      OFFSET 0.0 -3.0 1.0
    }}
  }}
}}
MOTION
Frames: {frames}
Frame Time: 0.0333333
{rows}
"""


def bvh(rows, frames=None):
    return BVH.format(
        frames=len(rows) if frames is None else frames, rows="\n".join(" ".join(map(str, r)) for r in rows)
    )


ROWS = [[1, 2, 3, 0, 0, 0, 0, 0, 0], [1, 2, 4, 0, 0, 0, 0, 90, 0], [1, 2, 5, 90, 0, 0, 0, 0, 0]]


@needs_bvhio
def test_bvh_by_hand(tmp_path):
    (tmp_path / "a.bvh").write_text(bvh(ROWS))
    data = load_data(config(tmp_path))
    assert (data.modality.fps, data.modality.parents) == (30.0, (-1, 0, 1))
    values = np.zeros((1, 3 + 9, 3))
    values[0, :3] = np.array(ROWS)[:, :3].T
    values[0, 6, 1], values[0, 5, 2] = 0, np.pi / 2  # third frame: about z
    values[0, 6, 1] = np.pi / 2  # second frame: the leg about x
    found = data.modality.positions(torch.from_numpy(values))[0]
    np.testing.assert_allclose(found[0], [[1, 2, 3], [1, -2, 3], [1, -5, 4]], atol=1e-9)
    np.testing.assert_allclose(found[1], [[1, 2, 4], [1, -2, 4], [1, -3, 1]], atol=1e-9)
    np.testing.assert_allclose(found[2], [[1, 2, 5], [5, 2, 5], [8, 2, 6]], atol=1e-9)
    same_motion(data.modality.skeletons(data.samples)[0][:2], found[:2], atol=1e-4)


@needs_bvhio
def test_bvh_turns_in_the_order_of_its_channels(tmp_path):
    (tmp_path / "a.bvh").write_text(bvh([[0, 9, 0, 20, 30, 40, 10, 50, -20], [1, 9, 0, 10, 30, 40, 10, 60, -20]]))
    data = load_data(config(tmp_path))
    clip = data.modality.skeletons(data.samples)[0][0]
    root = Rotation.from_euler("ZXY", [20, 30, 40], degrees=True)
    leg = root * Rotation.from_euler("ZXY", [10, 50, -20], degrees=True)
    knee = np.array([0, 9.0, 0]) + root.apply([0, -4, 0])
    expected = np.stack([[0, 9, 0], knee, knee + leg.apply([0, -3, 1])])
    np.testing.assert_allclose(clip[:, 1], expected[:, 1], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(clip[2] - clip[0]), np.linalg.norm(expected[2] - expected[0]), atol=1e-5)


@needs_bvhio
@pytest.mark.parametrize(
    "content",
    [
        "HIERARCHY\nROOT Hips\n{\n",
        bvh(ROWS).split("Frame Time")[0],
        bvh(ROWS, frames=9),
        bvh([row[:-1] for row in ROWS]),
        bvh([], frames=0),
        bvh([[float("nan")] * 9]),
        bvh(ROWS).replace("0.0333333", "0"),
        bvh(ROWS).replace("ROOT", "BOOT"),
        "",
    ],
)
def test_broken_bvh_among_others_is_named_and_skipped(tmp_path, content):
    (tmp_path / "a.bvh").write_text(bvh(ROWS))
    (tmp_path / "b.bvh").write_text(content)
    data = load_data(config(tmp_path))
    assert (len(data), list(data.broken)) == (1, [str(tmp_path / "b.bvh")])


@needs_bvhio
def test_bvh_of_another_skeleton(tmp_path):
    (tmp_path / "a.bvh").write_text(bvh(ROWS))
    (tmp_path / "b.bvh").write_text(bvh(ROWS).replace("-4.0", "-5.0"))  # longer legs are no other skeleton
    assert len(load_data(config(tmp_path))) == 2
    lines = bvh([row[:6] for row in ROWS]).split("\n")
    short = [*lines[:5], "End Site", "{", "OFFSET 0 1 0", "}", *lines[lines.index("}") :]]
    (tmp_path / "c.bvh").write_text("\n".join(short))
    with pytest.raises(DataError, match=r"c\.bvh is of another skeleton than .*a\.bvh: 2 joints .*, not 3 joints"):
        load_data(config(tmp_path))


def test_bvh_without_its_parser_says_what_brings_it(tmp_path, monkeypatch):
    (tmp_path / "a.bvh").write_text(bvh(ROWS))
    monkeypatch.setitem(sys.modules, "bvhio", None)
    with pytest.raises(ConfigError, match=r"pip install 'layersync_kernels\[motion\]'"):
        load_data(config(tmp_path))


# HumanML3D


def humanml3d(folder, lengths, *, split=("train", "train", "test"), texts=None):
    """A folder of random features; returns them by name."""
    for name in ("new_joint_vecs", "texts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    made = {}
    rng = np.random.default_rng(0)
    for number, (length, part) in enumerate(zip(lengths, split, strict=True)):
        name = f"{number:06d}"
        made[name] = rng.normal(size=(length, 263)).astype(np.float32)
        np.save(folder / "new_joint_vecs" / f"{name}.npy", made[name])
        with (folder / f"{part}.txt").open("a") as file:
            file.write(f"{name}\n")
        lines = (texts or {}).get(number, ["a man walks.#a/DET man/NOUN walk/VERB#0.0#0.0"])
        if lines:
            (folder / "texts" / f"{name}.txt").write_text("\n".join(lines))
    return made


def test_humanml3d_features_split_and_rate(tmp_path):
    made = humanml3d(tmp_path, [30, 50, 20])
    data = load_data(config(tmp_path, motion_frames=40, motion_stride=40, motion_fps=30.0))
    assert (data.lengths.tolist(), data.test.tolist()) == ([30, 40, 10, 20], [False, False, False, True])
    assert (data.modality.fps, data.spec.shape, data.text) == (20.0, (263, 40), None)
    restored = data.modality.restore(data.samples)
    torch.testing.assert_close(restored[0, :, :30].mT, torch.from_numpy(made["000000"]), atol=1e-5, rtol=1e-4)


def test_humanml3d_published_statistics_are_used(tmp_path):
    made = humanml3d(tmp_path, [30, 30, 30])
    np.save(tmp_path / "Mean.npy", np.full(263, 2.0, np.float32))
    np.save(tmp_path / "Std.npy", np.full(263, 4.0, np.float32))
    data = load_data(config(tmp_path))
    torch.testing.assert_close(data.samples[0], torch.from_numpy((made["000000"].T - 2) / 4))


def test_humanml3d_captions_are_samples_of_what_they_are_about(tmp_path):
    texts = {0: ["a man walks.#x#0.0#0.0", "he stops#x#0.5#1.0"], 1: ["someone jumps high#x#nan#nan"]}
    humanml3d(tmp_path, [30, 50, 20], texts=texts)
    data = load_data(dataclasses.replace(config(tmp_path, motion_frames=60), text_encoder="hashed"))
    assert data.lengths.tolist() == [30, 10, 50, 20]
    assert data.text_lengths.tolist() == [4, 2, 3, 4]
    assert data.captions == ("a man walks.", "he stops", "someone jumps high")
    assert data.text_encoder == "hashed"
    batch = data.take(torch.tensor([3, 0]))
    torch.testing.assert_close(batch.condition.text[0], batch.condition.text[1])
    assert set(batch.condition.keywords()) == {"y", "lengths", "text", "text_lengths"}


def test_humanml3d_without_a_caption_is_named_and_skipped(tmp_path):
    humanml3d(tmp_path, [30, 30, 30], texts={1: []})
    asked = dataclasses.replace(config(tmp_path), text_encoder="hashed")
    assert list(load_data(asked).broken) == ["000001"]
    assert len(load_data(config(tmp_path))) == 3
    for text in (tmp_path / "texts").iterdir():
        text.unlink()
    with pytest.raises(DataError, match="none of the 3 recordings can be read"):
        load_data(asked)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((9, 251), np.float32), r"expected \(T, 263\), of HumanML3D's body"),
        (np.full((9, 263), np.inf, np.float32), "frame 0 is not finite"),
        (np.zeros((0, 263), np.float32), "it has no frames"),
        (np.array([{}]), "Object arrays cannot be loaded"),
    ],
)
def test_humanml3d_broken_features(tmp_path, array, message):
    humanml3d(tmp_path, [30, 30, 30])
    np.save(tmp_path / "new_joint_vecs" / "000001.npy", array, allow_pickle=True)
    broken = load_data(config(tmp_path)).broken
    assert list(broken) == ["000001"]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(broken["000001"])


def test_humanml3d_path_is_followed(tmp_path):
    """A body that steps ahead by 0.1 and turns by 0.2 a frame: HumanML3D gives half angles, to the next frame."""
    features = torch.zeros(1, 263, 5)
    features[0, 0], features[0, 2], features[0, 3] = -0.1, 0.1, 0.9
    features[0, 4:7] = torch.tensor([0.0, 0.5, 0.25])[:, None]  # joint 1, ahead of the root
    modality = Motion(representation="humanml3d", fps=20.0, parents=HUMANML3D_PARENTS)
    found = modality.positions(features)[0]
    angles = 0.2 * np.arange(5)
    steps = 0.1 * np.stack([np.sin(angles), np.zeros(5), np.cos(angles)], -1)[1:]
    expected = np.array([0, 0.9, 0]) + np.concatenate([np.zeros((1, 3)), steps.cumsum(0)])
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-6)
    ahead = np.stack([np.sin(angles), np.zeros(5), np.cos(angles)], -1) * 0.25
    np.testing.assert_allclose(found[:, 1], expected * [1, 0, 1] + ahead + [0, 0.5, 0], atol=1e-6)


# CMU


def cmu(folder, **arrays):
    rng = np.random.default_rng(0)

    def sequence(frames):
        values = np.zeros((frames, 117), np.float16)
        values[:, 2], values[:, 1] = np.arange(frames) * 0.2, 17
        values[1:, 9:12] = 0.3 * rng.normal(size=(frames - 1, 3))
        return values

    usual = {
        "data|cmu_mocap|train|walking|walking_1.txt": sequence(300),
        "data|cmu_mocap|train|walking_extra|walking_9.txt": sequence(101),
        "data|cmu_mocap|train|running|running_1.txt": sequence(121),
        "data|cmu_mocap|train|directing_traffic|directing_traffic_1.txt": sequence(200),
        "data|cmu_mocap|test|running|running_1.txt": sequence(81),
    }
    np.savez(folder / "cmu_mocap.npz", **(usual | arrays))
    return usual


def cmu_config(folder, **others):
    return DataConfig(data="cmu-mocap", data_root=folder, motion=MotionConfig(motion_frames=32), **others)


def test_cmu_actions_split_and_rate(tmp_path):
    made = cmu(tmp_path)
    data = load_data(cmu_config(tmp_path))
    assert data.class_names == ["walking", "running", "jumping", "soccer", "basketball", "basketball_signal"]
    assert (data.modality.fps, data.modality.joints) == (30.0, 38)
    assert data.lengths[data.test].tolist() == [20]
    assert data.labels[data.test].tolist() == [1]
    assert set(data.labels[~data.test].tolist()) == {0, 1}
    values = made["data|cmu_mocap|test|running|running_1.txt"][1::4].astype(np.float64)
    clip = data.modality.skeletons(data.samples[data.test], data.lengths[data.test])[0]
    metre = 0.45 * 100 / 2.54
    np.testing.assert_allclose(np.diff(clip[:, 0, 2]), np.diff(values[:, 2]) / metre, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(clip[:, 3] - clip[:, 2], axis=-1), 7.5936 / metre, atol=1e-4)  # a thigh
    thigh = Rotation.from_rotvec(-values[:, 9:12]).apply([2.5972, -7.13576, 0])  # the files' matrices are transposed
    np.testing.assert_allclose(clip[:, 3, 1] - clip[:, 2, 1], thigh[:, 1] / metre, atol=1e-4)


def test_cmu_is_looked_for_in_the_environment_too(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no cmu_mocap\.npz in"):
        load_data(cmu_config(tmp_path))
    (tmp_path / "there").mkdir()
    cmu(tmp_path / "there")
    monkeypatch.setenv("LAYERSYNC_DATA", str(tmp_path / "there"))
    assert len(load_data(cmu_config(tmp_path))) > 0


def test_cmu_recordings_are_cut_where_the_body_turns_over(tmp_path):
    name = "data|cmu_mocap|train|walking|walking_1.txt"
    values = cmu(tmp_path)[name]
    values[149:153, 3:6] = [0, 2, 2]
    cmu(tmp_path, **{name: values})
    data = load_data(cmu_config(tmp_path, split="train"))
    whole = load_data(cmu_config(tmp_path, split="train")).labels == 0
    assert data.lengths[whole].sum() > 80  # what lies on both sides is used
    turns = data.modality.features(data.modality.restore(data.samples))[:, 0]
    assert turns.abs().max() < 0.2


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((50, 99), np.float16), r"shape \(50, 99\); expected \(T, 117\), of CMU's 38 joints"),
        (np.full((50, 117), np.nan, np.float16), "frame 0 is not finite"),
        (np.zeros((1, 117), np.float16), "it has no frames"),
    ],
)
def test_cmu_of_another_skeleton_or_broken(tmp_path, array, message):
    name = "data|cmu_mocap|train|running|running_1.txt"
    cmu(tmp_path, **{name: array})
    with pytest.raises(DataError, match=message) as caught:
        load_data(cmu_config(tmp_path))
    assert name in str(caught.value)


# Pictures and files


def test_overview_is_a_picture_first_and_a_film(tmp_path):
    data = load_data(config(save_positions(tmp_path / "a.npz", places(20), places(20, 1), lengths=np.array([20, 12]))))
    picture, film = data.modality.overview(data.samples, tmp_path / "new" / "grid", columns=2, lengths=data.lengths)
    assert (picture.name, film.name) == ("grid.png", "grid.gif")
    with Image.open(picture) as still:
        still.load()
        assert still.format == "PNG"
    with Image.open(film) as moving:
        assert (moving.size, moving.n_frames, moving.info["duration"]) == ((2 * CELL, CELL), 20, 30)
        frames = []
        for frame in range(moving.n_frames):
            moving.seek(frame)
            frames.append(np.asarray(moving.convert("RGB")).astype(int))
    left, right = (np.stack(frames)[:, :, part] for part in (slice(0, CELL), slice(CELL, None)))
    assert np.abs(np.diff(left[12:], axis=0)).any()
    assert not np.abs(np.diff(right[12:], axis=0)).any()  # it is over, and stands still
    assert np.unique(left.reshape(-1, 3), axis=0).shape[0] == 5  # paper, ground, two legs and what is above


def test_films_of_bodies_that_left_the_world(tmp_path):
    """A sample of an untrained model may be anything."""
    save_film([np.full((3, 7, 3), np.nan), 1e30 * places(3)], PARENTS, 120.0, tmp_path / "a.gif", columns=1)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.size == (CELL, 2 * CELL)


def test_a_saved_sample_is_data_again(tmp_path):
    data = load_data(config(save_positions(tmp_path / "a.npz", places(20), fps=25)))
    path = data.modality.save(data.samples[0], tmp_path / "out" / "sample")
    assert {file.name for file in path.parent.iterdir()} == {"sample.npz", "sample.gif"}
    again = load_data(config(path))
    assert (again.modality.fps, again.modality.parents) == (25.0, PARENTS)
    same_motion(again.modality.skeletons(again.samples)[0], places(20))


def test_arrays_hold_joints_and_lengths(tmp_path):
    data = load_data(config(save_positions(tmp_path / "a.npz", places(20), places(20, 1), lengths=np.array([20, 12]))))
    arrays = data.modality.arrays(data.samples, data.lengths)
    assert arrays["positions"].shape == (2, 20, 7, 3)
    assert arrays["lengths"].tolist() == [20, 12]
    assert not arrays["positions"][1, 12:].any()
    same_motion(arrays["positions"][1, :12], places(20, 1)[:12])
