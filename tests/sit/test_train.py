from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image

from layersync_kernels.bench.demo import demo_config
from layersync_kernels.bench.throughput import (
    PROVIDERS,
    TRAINERS,
    PublishedTrainer,
    measure_throughput,
    provider_config,
)
from layersync_kernels.errors import CheckpointError, ConfigError, TrainingDiverged, UserError
from layersync_kernels.modules.block import AdaLNZeroBlock
from layersync_kernels.sit.checkpoints import local as checkpoint
from layersync_kernels.sit.checkpoints.local import list_checkpoints, read_tensors
from layersync_kernels.sit.commands.train import run_training
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.config.io import load_config, save_config
from layersync_kernels.sit.config.loss import LayerSyncConfig
from layersync_kernels.sit.config.model import ModelConfig
from layersync_kernels.sit.config.optim import OptimConfig
from layersync_kernels.sit.config.run import CONFIG, LogConfig, TrainConfig
from layersync_kernels.sit.config.sampling import SamplingConfig
from layersync_kernels.sit.data.memory import MemorySet
from layersync_kernels.sit.spec import SampleSpec
from layersync_kernels.sit.training import loop as train
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.runlog import Meter, read_records
from layersync_kernels.sit.training.terms.layersync import LayerSyncTerm, build_loss


def tiny_config(**groups):
    """Trains in milliseconds: 16 samples of 4x4, three blocks of width 16."""
    config = TrainConfig(
        data=DataConfig(data="unused", flip=True),
        model=ModelConfig(model="SiT-P/2", hidden_size=16, depth=3, num_heads=2, class_dropout=0.3),
        optim=OptimConfig(steps=12, batch_size=5, lr=1e-2, ema_decay=0.9, clip_norm=1.0, warmup_steps=4, accumulate=1),
        sampling=SamplingConfig(solver="euler", sampling_steps=3, cfg_scale=2.0),
        log=LogConfig(log_every=2, sample_every=4, checkpoint_every=4, tensorboard=False, grid_columns=2, keep=10),
        device="cpu",
        precision="fp32",
    )
    for name, changes in groups.items():
        value = dataclasses.replace(getattr(config, name), **changes) if isinstance(changes, dict) else changes
        config = dataclasses.replace(config, **{name: value})
    return config


def tiny_data():
    generator = torch.Generator().manual_seed(0)
    return MemorySet(
        spec=SampleSpec(1, (4, 4)),
        num_classes=3,
        class_names=["a", "b", "c"],
        samples=torch.randint(0, 256, (16, 1, 4, 4), generator=generator, dtype=torch.uint8),
        labels=torch.arange(16) % 3,
    )


@pytest.fixture(autouse=True)
def _tiny_data(monkeypatch):
    monkeypatch.setattr("layersync_kernels.sit.training.loop.load_data", lambda config, device: tiny_data())


def weights(run, step, stem="model"):
    return read_tensors(run / "checkpoints" / f"step_{step:08d}" / f"{stem}.safetensors")


def assert_equal_files(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


# The trajectory


@pytest.mark.parametrize("stop_at", [4, 8])
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, stop_at):
    config = tiny_config()
    run_training(config, tmp_path / "whole")
    run_training(tiny_config(optim={"steps": stop_at}), tmp_path / "parts")
    torch.manual_seed(12345)  # what another process would start with
    run_training(config, tmp_path / "parts", resume=True)
    for stem in ("model", "ema", "optimizer", "rng"):
        assert_equal_files(weights(tmp_path / "whole", 12, stem), weights(tmp_path / "parts", 12, stem))
    assert [r["step"] for r in read_records(tmp_path / "parts")] == [2, 4, 6, 8, 10, 12]


def test_two_runs_of_one_seed_are_equal_and_of_two_are_not(tmp_path):
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        run_training(tiny_config(seed=seed), tmp_path / name)
    assert_equal_files(weights(tmp_path / "a", 12), weights(tmp_path / "b", 12))
    with pytest.raises(AssertionError):
        assert_equal_files(weights(tmp_path / "a", 12), weights(tmp_path / "c", 12))


def test_drawing_samples_and_saving_leave_the_trajectory_alone(tmp_path):
    run_training(tiny_config(), tmp_path / "often")
    run_training(tiny_config(log={"sample_every": 0, "checkpoint_every": 100, "log_every": 100}), tmp_path / "never")
    assert_equal_files(weights(tmp_path / "often", 12), weights(tmp_path / "never", 12))


class FixedNoise:
    """A transport whose noise and times are functions of the sample, so that passes of any size see the same."""

    def __init__(self, transport):
        self.transport = transport

    def training_losses(self, model, x, kwargs, *, generator):
        return self.transport.training_losses(model, x, kwargs, x0=x.flip(-1), t=x.mean((1, 2, 3)).sigmoid())


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    results = []
    for accumulate in (1, 3):
        optim = {"accumulate": accumulate, "batch_size": 6}
        trainer = Trainer(tiny_config(optim=optim, model={"class_dropout": 0.0}), tiny_data())
        trainer.transport = FixedNoise(trainer.transport)
        trainer.step(*next(trainer.data.batches(6, seed=0)))
        results.append(trainer.state.optimizer.state_dict()["state"])
    for number, state in results[0].items():
        torch.testing.assert_close(results[1][number]["exp_avg"], state["exp_avg"], rtol=1e-4, atol=1e-6)


def test_ema_is_the_decayed_sum_of_all_weights_so_far():
    trainer = Trainer(tiny_config(optim={"ema_decay": 0.75}), tiny_data())
    name = "blocks.0.mlp.fc1.weight"
    expected = trainer.model.state_dict()[name].clone()
    batches = trainer.data.batches(5, seed=0)
    for _ in range(5):
        trainer.step(*next(batches))
        expected = 0.75 * expected + 0.25 * trainer.model.state_dict()[name]
    torch.testing.assert_close(trainer.ema.state_dict()[name], expected)
    assert not torch.equal(expected, trainer.model.state_dict()[name])


def test_ema_warmup_forgets_the_initial_weights_early():
    trainer = Trainer(tiny_config(optim={"ema_decay": 0.9999, "ema_warmup": True}), tiny_data())
    before = trainer.ema.state_dict()["final_layer.linear.weight"].clone()
    trainer.step(*next(trainer.data.batches(5, seed=0)))
    after, now = (m.state_dict()["final_layer.linear.weight"] for m in (trainer.ema, trainer.model))
    torch.testing.assert_close(after, torch.lerp(before, now, 1 - 1 / 10))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 0.8, 0.6, 0.4, 0.2]), ("cosine", [0.5, 0.9045, 0.6545, 0.3455])],
)
def test_learning_rate_warms_up_and_decays(schedule, rates):
    trainer = Trainer(
        tiny_config(optim={"lr": 1.0, "lr_schedule": schedule, "warmup_steps": 2, "steps": 5}), tiny_data()
    )
    for step, rate in enumerate(rates):
        trainer.state.steps_done = step
        assert trainer.learning_rate() == pytest.approx(rate, abs=1e-4)


def test_time_budget_ends_the_run_and_decays_the_rate(tmp_path, monkeypatch):
    ticks = itertools.count()  # a clock that a busy machine does not disturb: 1 ms at each look
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: 1e-3 * next(ticks)))
    log = {"sample_every": 0, "checkpoint_every": 10**9}
    config = tiny_config(optim={"steps": 10**9, "max_seconds": 0.2, "lr_schedule": "linear"}, log=log)
    outcome = run_training(config, tmp_path / "run")
    assert outcome.ended == "finished"
    assert 10 < outcome.step < 500
    assert outcome.seconds == pytest.approx(0.2, abs=0.05)
    rates = [r["lr"] for r in read_records(tmp_path / "run")]
    assert rates[-1] < 0.2 * max(rates)


# LayerSync in the loop


def test_off_is_plain_sit_and_captures_nothing(monkeypatch):
    """The weights are those of a hand-written SiT step, and the model is never asked for hidden states."""
    config = tiny_config(
        layersync={"layersync": ("off",)}, optim={"clip_norm": None, "warmup_steps": 0}, data={"flip": False}
    )
    trainer = Trainer(config, tiny_data())
    assert trainer.term(LayerSyncTerm) is None
    plain = Trainer(config, tiny_data())
    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda x, t, y: forward(x, t, y))  # has no `capture`
    batches = [batch for _, batch in zip(range(3), trainer.data.batches(5, seed=0), strict=False)]
    torch.manual_seed(1)
    for batch in batches:
        trainer.step(*batch)
    optimizer = torch.optim.AdamW(plain.state.weights, lr=config.optim.lr, weight_decay=0, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(1)
    for samples, labels in batches:
        loss = plain.transport.training_losses(plain.model, samples, {"y": labels}, generator=generator)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_equal_files(trainer.model.state_dict(), plain.model.state_dict())


def test_layersync_changes_training_and_logs_a_cosine_per_pair(tmp_path):
    pairs = {"layersync": ("1:2", "1:3"), "weight": (0.5, 0.25)}
    run_training(tiny_config(layersync=pairs), tmp_path / "on")
    run_training(tiny_config(layersync={"layersync": ("off",)}), tmp_path / "off")
    with pytest.raises(AssertionError):
        assert_equal_files(weights(tmp_path / "on", 12), weights(tmp_path / "off", 12))
    for record in read_records(tmp_path / "on"):
        assert set(record["cosine"]) == {"1:2", "1:3"}
        weighted = -0.5 * record["cosine"]["1:2"] - 0.25 * record["cosine"]["1:3"]
        assert record["align_loss"] == pytest.approx(weighted, rel=1e-4)
    assert all("cosine" not in record and "align_loss" not in record for record in read_records(tmp_path / "off"))


def test_nothing_is_captured_in_steps_that_layersync_skips(monkeypatch):
    trainer = Trainer(tiny_config(layersync={"every": 2, "stop_step": 5}), tiny_data())
    asked = []
    forward = trainer.model.forward

    def spy(x, t, y, capture=()):
        asked.append(tuple(capture))
        return forward(x, t, y, capture)

    monkeypatch.setattr(trainer.model, "forward", spy)
    batches = trainer.data.batches(5, seed=0)
    for _ in range(7):
        trainer.step(*next(batches))
    captures = trainer.term(LayerSyncTerm).module.captures
    assert asked == [captures, (), captures, (), captures, (), ()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layersync": ("2:9",)}, r"2:9: the model has blocks 1 to 3"),
        ({"layersync": ("2:2",)}, "both block 2"),
        ({"layersync": ("3:1",)}, "did you mean"),
        ({"layersync": ("0:2",)}, "counted from 1"),
        ({"layersync": ("8-16",)}, "expected STUDENT:TEACHER"),
        ({"layersync": ("auto", "1:2")}, "alone"),
        ({"layersync": ()}, "at least one"),
        ({"weight": (0.1, 0.2)}, "2 weights for 1 pairs"),
        ({"schedule": "cosine"}, "stop_step"),
        ({"every": 0}, "every"),
    ],
)
def test_bad_layersync_settings_are_explained(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_loss(dataclasses.replace(LayerSyncConfig(), **changes), depth=3)


# Settings


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"model": {"model": "SiT-XXL/2"}}, r"SiT-XXL/2.*SiT-XL/2"),
        ({"model": {"patch_size": 3}}, r"input_size=4 .*patch_size=3"),
        ({"model": {"num_heads": 5}}, "num_heads=5"),
        ({"model": {"num_classes": 2}}, "the data has 3"),
        ({"model": {"class_dropout": 1.5}}, "--class-dropout 1.5"),
        ({"optim": {"batch_size": 0}}, "--batch-size 0"),
        ({"optim": {"accumulate": 2}}, "does not divide"),
        ({"optim": {"lr": -1.0}}, "--lr -1.0"),
        ({"optim": {"ema_decay": 1.0}}, "--ema-decay 1.0"),
        ({"optim": {"clip_norm": 0.0}}, "--clip-norm"),
        ({"optim": {"max_seconds": 0.0}}, "--max-seconds"),
        ({"log": {"log_every": 0}}, "--log-every 0"),
        ({"sampling": {"guidance_interval": (0.8, 0.2)}}, "--guidance-interval"),
        ({"sampling": {"sampler": "sde", "solver": "dopri5"}}, "--sampler sde"),
        ({"transport": {"loss_weight": "velocity"}}, "no weight"),
        ({"device": "cuda:77"}, "--device cuda:77"),
        ({"device": "toaster"}, "--device toaster"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_bad_settings_are_explained_before_a_folder_is_made(tmp_path, groups, message):
    with pytest.raises(UserError, match=message):
        run_training(tiny_config(**groups), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [TrainConfig(), tiny_config(), demo_config()], ids=["default", "tiny", "demo"])
def test_config_file_round_trip(tmp_path, config):
    save_config(config, tmp_path / "c.json")
    assert load_config(tmp_path / "c.json") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"learning_rate": 1}}, r"unknown settings \['learning_rate'\]"),
        ({"optim": {"steps": "many"}}, r"optim.*steps is 'many'; expected int"),
        ({"optim": {"betas": [0.9]}}, "betas"),
        ({"optim": {"lr": True}}, "lr is True"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"data": []}, "expected an object"),
    ],
)
def test_bad_config_file_names_file_and_setting(tmp_path, change, message):
    (tmp_path / "c.json").write_text(json.dumps(change))
    with pytest.raises(ConfigError, match=rf"c\.json.*{message}"):
        load_config(tmp_path / "c.json")


def test_defaults_are_those_of_the_paper():
    optim = TrainConfig().optim
    assert (optim.lr, optim.lr_schedule, optim.weight_decay, optim.ema_decay) == (1e-4, "constant", 0.0, 0.9999)
    assert (optim.batch_size, optim.warmup_steps, optim.ema_warmup, optim.clip_norm) == (256, 0, False, None)


# The run's folder


def test_run_folder_holds_all_that_is_promised(tmp_path):
    config = tiny_config(log={"tensorboard": True, "keep": 1})
    run_training(config, tmp_path / "run")
    run = tmp_path / "run"
    assert load_config(run / CONFIG) == config
    assert [p.name for p in list_checkpoints(run)] == ["step_00000012"]
    assert [p.name for p in sorted((run / "samples").iterdir())] == [f"step_{s:08d}.png" for s in (4, 8, 12)]
    assert Image.open(run / "curves.png").size[0] > 100
    assert len(list((run / "tensorboard").iterdir())) == 1
    record = read_records(run)[-1]
    assert {"step", "loss", "align_loss", "cosine", "lr", "grad_norm", "images_per_second", "seconds"} == set(record)


def test_existing_run_is_not_touched_unless_asked(tmp_path):
    run = tmp_path / "run"
    run_training(tiny_config(), run)
    before = weights(run, 12)
    with pytest.raises(ConfigError, match=r"run exists; choose another --out, or --resume or --overwrite"):
        run_training(tiny_config(seed=1), run)
    assert_equal_files(before, weights(run, 12))
    with pytest.raises(ConfigError, match="exclude"):
        run_training(tiny_config(), run, resume=True, overwrite=True)
    with pytest.raises(ConfigError, match=r"finished at step 12; give more --steps"):
        run_training(tiny_config(), run, resume=True)
    run_training(tiny_config(seed=1), run, overwrite=True)
    with pytest.raises(AssertionError):
        assert_equal_files(before, weights(run, 12))


def test_folder_that_is_no_run_is_never_deleted(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for flags in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(ConfigError, match="not a run"):
            run_training(tiny_config(), tmp_path, **flags)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_settings_that_fail_do_not_delete_the_run_to_be_overwritten(tmp_path):
    run_training(tiny_config(), tmp_path / "run")
    with pytest.raises(ConfigError):
        run_training(tiny_config(model={"model": "nonsense"}), tmp_path / "run", overwrite=True)
    assert weights(tmp_path / "run", 12)


def test_resume_with_another_model_names_the_file(tmp_path):
    run_training(tiny_config(optim={"steps": 4}), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit"):
        run_training(tiny_config(model={"depth": 2}), tmp_path / "run", resume=True)


def test_init_starts_from_a_checkpoint(tmp_path):
    run_training(tiny_config(), tmp_path / "run")
    trainer = Trainer(tiny_config(model={"init": tmp_path / "run"}), tiny_data())
    assert_equal_files(trainer.model.state_dict(), weights(tmp_path / "run", 12, "ema"))


# When things go wrong


def test_full_disk_lets_training_go_on_and_keeps_the_last_checkpoint(tmp_path, monkeypatch, caplog):
    attempts = []
    save_file = checkpoint.save_file

    def sometimes_full(tensors, path):
        attempts.append(path)
        if "00000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", sometimes_full)
    assert run_training(tiny_config(), tmp_path / "run").step == 12
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step_00000004", "step_00000012"]
    assert "No space left" in caplog.text
    assert "training goes on" in caplog.text


def test_full_disk_at_the_end_is_an_error_that_names_the_last_checkpoint(tmp_path, monkeypatch):
    save_file = checkpoint.save_file

    def full(tensors, path):
        if "00000004" not in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*last good checkpoint is .*step_00000004"):
        run_training(tiny_config(), tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr("layersync_kernels.sit.training.loop.load_data", lambda config, device: tiny_data())
    assert run_training(tiny_config(), tmp_path / "run", resume=True).step == 12


@pytest.mark.parametrize("bad_step", [6, 7])
def test_nan_loss_stops_names_the_step_and_keeps_good_checkpoints(tmp_path, monkeypatch, bad_step):
    step = Trainer.step

    def poisoned(self, samples, labels):
        step(self, samples * float("nan") if self.steps_done + 1 == bad_step else samples, labels)

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(TrainingDiverged, match=rf"not finite at step {bad_step}; .*step_00000004"):
        run_training(tiny_config(), tmp_path / "run")
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step_00000004"]


def test_nan_weights_are_never_saved(tmp_path):
    trainer = Trainer(tiny_config(), tiny_data(), run_dir=tmp_path)
    with torch.no_grad():
        trainer.model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match="weights were not finite"):
        trainer.save()
    assert list_checkpoints(tmp_path) == []


SLOW_RUN = """
import sys, time, torch
from layersync_kernels import cli
from layersync_kernels.sit.training.loop import Trainer
step = Trainer.step
def slow(self, *batch):
    step(self, *batch)
    print("step", self.steps_done, flush=True)
    end = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < end:  # a signal just before a long sleep would be handled only after it
        time.sleep(0.01)
Trainer.step = slow
sys.exit(cli.main(sys.argv[2:]))
"""


@contextlib.contextmanager
def slow_run(run, pause):
    """A training process that has done its first step, and sleeps after each."""
    size = ["--image-size=4", "--model=SiT-P/2", "--hidden-size=8", "--num-heads=2", "--depth=2", "--batch-size=2"]
    command = [sys.executable, "-c", SLOW_RUN, str(pause), "train", "--out", str(run), *size, "--no-tensorboard"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while (line := process.stdout.readline()) and not line.startswith("step"):
            pass
        assert line, process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_finishes_the_step_saves_and_says_how_to_resume(tmp_path, number):
    with slow_run(tmp_path / "run", 0.2) as process:
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    (saved,) = list_checkpoints(tmp_path / "run")
    text = " ".join(errors.split())
    assert f"saved at step {int(saved.name[5:])}" in text
    assert "--resume" in text
    assert "Traceback" not in text


def test_second_interrupt_aborts(tmp_path):
    with slow_run(tmp_path / "run", 30) as process:
        os.kill(process.pid, signal.SIGINT)
        while "aborts" not in process.stderr.readline():  # two signals at once would count as one
            pass
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=25)
    assert process.returncode == 130
    assert "aborted" in errors
    assert "Traceback" not in errors
    assert list_checkpoints(tmp_path / "run") == []


# Meters and throughput


def test_meter_averages_between_reads():
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add("loss", torch.tensor(value))
    assert meter.read() == {"loss": 3.0}
    assert meter.read() == {}


def test_throughput_of_every_provider():
    configs = {name: provider_config(tiny_config(), name) for name in PROVIDERS if name != "compile"}
    assert configs["off"].layersync.layersync == ("off",)
    assert configs["eager"].layersync.loss_backend == "reference"
    assert configs["eager"].model.kernels == "eager"
    assert configs["published"].precision == "fp32"
    assert configs["applied"].model.kernels == "eager"
    assert configs["applied"].layersync.loss_backend == "auto"
    rates = measure_throughput(configs, trainers=TRAINERS, steps=1, rounds=2, warmup=1, data=tiny_data())
    assert all(0 < min(rate.rounds) <= rate.median for rate in rates.values())
    assert rates["eager"].over(rates["eager"]) == 1
    assert provider_config(tiny_config(), "compile").compile == "on"
    with pytest.raises(ValueError, match="no provider"):
        provider_config(tiny_config(), "magic")


def test_configurations_that_differ_in_layersync_share_a_trainer(monkeypatch):
    from layersync_kernels.bench import throughput

    made = []
    monkeypatch.setattr(throughput, "Trainer", lambda *args: made.append(Trainer(*args)) or made[-1])
    seen = []
    step = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, *batch: (seen.append(self.term(LayerSyncTerm) is None), step(self, *batch))
    )
    configs = {name: provider_config(tiny_config(), name) for name in ("fused", "off")}
    measure_throughput(configs, steps=1, rounds=2, warmup=0, data=tiny_data())
    assert len(made) == 1
    assert seen == [False, True, True, False]


def test_the_applied_trainer_has_fused_blocks_in_a_plain_model():
    trainer = TRAINERS["applied"](provider_config(tiny_config(), "applied"), tiny_data())
    assert {type(block) for block in trainer.model.blocks} == {AdaLNZeroBlock}


def test_the_published_average_and_optimiser_give_the_same_weights():
    trainers = [kind(tiny_config(model={"kernels": "eager"}), tiny_data()) for kind in (Trainer, PublishedTrainer)]
    for trainer in trainers:
        torch.manual_seed(0)  # of the weights, then of the labels that are dropped
        for parameter in trainer.model.parameters():  # at initialisation gradients are noise, which AdamW amplifies
            parameter.detach().normal_(std=0.1)
        batches = trainer.data.batches(trainer.config.optim.batch_size, seed=0)
        for _ in range(3):
            trainer.step(*next(batches))
    for name in ("model", "ema"):
        states = [getattr(trainer, name).state_dict() for trainer in trainers]
        for key, value in states[0].items():
            # Three steps of 0.01; an average or a step that is wrong is off by a tenth of one or more.
            torch.testing.assert_close(
                value, states[1][key], rtol=0, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}"
            )
